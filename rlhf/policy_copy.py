"""A plain copy of a policy, which may be under training with a LoRA; the policy stays as it is."""

import copy
from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from transformers.cache_utils import DynamicCache, DynamicLayer


def plain_weights(policy) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the plain model that a policy is, its LoRA merged; the policy stays as it is.

    Names are those of the plain model. Where PEFT trains rows of an embedding, those are in it.
    """
    model = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    handled: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in handled):
            continue
        if isinstance(module, lora.LoraLayer):
            weight = module.base_layer.weight
            for adapter in module.active_adapters:
                weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
            yield f"{name}.weight", weight
            if getattr(module.base_layer, "bias", None) is not None:
                yield f"{name}.bias", module.base_layer.bias
            handled.append(name)
        elif isinstance(getattr(module, "token_adapter", None), TrainableTokensLayer):
            adapter = module.token_adapter
            yield f"{name}.weight", adapter.get_merged_weights(adapter.active_adapters)
            handled.append(name)
        else:
            own = module.named_parameters(name, recurse=False, remove_duplicate=False)
            yield from own


def why_not_copied(policy) -> str | None:
    """Why `copy_policy` cannot serve a policy; None where it can."""
    if getattr(policy, "quantization_method", None) or getattr(policy, "is_quantized", False):
        return "its weights are quantised"
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=policy.config).layers):
        return "its cache is not made of plain layers"
    for module in policy.modules():
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            plain = isinstance(module, lora.Linear | lora.Embedding | TrainableTokensLayer)
            special = any(
                any(getattr(module, name, {}).values()) for name in ("use_dora", "lora_bias")
            )
            if not plain or special or getattr(module, "merged", False):
                return f"its adapter is more than a plain LoRA ({type(module).__name__})"
    return None


def copy_policy(policy, dtype: torch.dtype, attn_implementation: str):
    """A plain model of the policy's kind, of other weights until `copy_weights` fills it."""
    base = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    with torch.random.fork_rng():  # the weights it draws are replaced: take none of the run's
        model = type(base)._from_config(
            copy.deepcopy(base.config), dtype=dtype, attn_implementation=attn_implementation
        )
    return model.to(base.device).eval().requires_grad_(False)


@torch.no_grad()
def copy_weights(policy, model) -> None:
    """Bring the policy's weights, as they are now, into a copy of `copy_policy`."""
    targets = dict(model.named_parameters(remove_duplicate=False))
    unwritten = {id(target): name for name, target in targets.items()}  # tied ones count once
    for name, weight in plain_weights(policy):
        if unwritten.pop(id(targets[name]), None):
            targets[name].copy_(weight)
    assert not unwritten, f"weights without a source: {list(unwritten.values())}"
