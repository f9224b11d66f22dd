"""A stage's model, quantised or not, with its LoRA; and the way back to one plain model."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig, get_peft_config, get_quantization_config

from pretrain.hardware import choose_attention
from tokenizer.special_tokens import IM_END, IM_START


def load_model(model_args: ModelConfig, tokenizer: Any) -> PreTrainedModel:
    """Load a causal language model, in 4 bits where the recipe says `load_in_4bit`.

    Raises:
        ValueError: tokenizer and model do not belong together, 4 bits without LoRA, or widths
            that bitsandbytes cannot pack into 4 bits on a CPU.
    """
    if model_args.load_in_4bit and not model_args.use_peft:
        raise ValueError("load_in_4bit needs use_peft: true; 4-bit weights cannot be trained")
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        dtype=getattr(torch, model_args.dtype or "float32"),
        attn_implementation=model_args.attn_implementation or choose_attention(),
        quantization_config=get_quantization_config(model_args),
    )
    check_vocabulary(model, tokenizer)
    if model_args.load_in_4bit and model.device.type == "cpu":
        check_packable(model)
    model.base_model.register_forward_pre_hook(count_real_positions, with_kwargs=True)
    return model


def count_real_positions(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A forward hook: positions count real tokens, also behind padding on the left.

    `generate` counts so, but TRL's trainers score its answers without `position_ids`, and GPT-2
    then counts the padding: the log-probabilities would not be those of what was sampled.
    """
    mask, ids = kwargs.get("attention_mask"), args[0] if args else kwargs.get("input_ids")
    if kwargs.get("position_ids") is None and mask is not None and ids is not None:
        if mask.shape == ids.shape:
            kwargs["position_ids"] = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    return args, kwargs


def check_vocabulary(model: PreTrainedModel, tokenizer: Any) -> None:
    """Raise a ValueError where the tokenizer makes ids that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer makes {len(tokenizer)} ids, the model knows {rows}: they do not belong "
            "together. Take both from the same directory"
        )


def check_packable(model: PreTrainedModel) -> None:
    """Raise a ValueError where a 4-bit layer's input width is no multiple of a block of 64.

    bitsandbytes packs the weights anew for a CPU in evaluation, and fails there on other widths.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit" and module.in_features % 64:
            raise ValueError(
                f"{name} reads {module.in_features} channels, and 4 bits on a CPU need a multiple "
                "of 64. Leave out load_in_4bit (LoRA alone), or pretrain with another n_embd"
            )


def context_length(model: PreTrainedModel) -> int:
    """Tokens that the model can read at once; no limit where its config names none."""
    return getattr(model.config, "max_position_embeddings", None) or 10**9


def make_lora_config(model_args: ModelConfig, tokenizer: Any) -> LoraConfig | None:
    """The LoRA of a recipe, None for full fine-tuning.

    The embedding rows of the chat tokens are trained as well: a base model has never seen them,
    and without it LoRA could not teach the model to stop.
    """
    config = get_peft_config(model_args)
    if config is None:
        return None
    if not model_args.lora_target_modules:
        config.target_modules = "all-linear"
    vocabulary = tokenizer.get_vocab()
    config.trainable_token_indices = [vocabulary[t] for t in (IM_START, IM_END) if t in vocabulary]
    return config


def complete_head(model: PreTrainedModel | PeftModel) -> None:
    """Give an output head with trainable rows the `bias` that TRL's fused loss looks for.

    PEFT's wrapper answers for `weight` (with the trained rows in place) and nothing else.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None


def merge_adapter(
    base: str | os.PathLike, adapter: str | os.PathLike, probe: torch.Tensor | None = None
) -> tuple[PreTrainedModel, dict[str, float]]:
    """Merge an adapter into the full-precision base, and measure what the merge changed.

    A 4-bit base is never merged into: its weights would be rounded once more. The base is read
    again in fp32 instead.

    Args:
        base: the directory the adapter was trained from.
        adapter: a PEFT adapter.
        probe: token ids (B, T) to compare on; None takes a few ids of the vocabulary.

    Returns:
        The plain model, and {"merge_max_logit_difference"} to the unmerged adapter model.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    probe = torch.arange(32)[None] % model.config.vocab_size if probe is None else probe
    model = PeftModel.from_pretrained(model, Path(adapter)).eval()
    with torch.no_grad():
        before = model(input_ids=probe).logits
        merged = model.merge_and_unload(safe_merge=True)
        difference = (merged(input_ids=probe).logits - before).abs().max().item()
    return merged, {"merge_max_logit_difference": difference}


def set_stop_tokens(model: PreTrainedModel, tokenizer: Any) -> None:
    """Let `generate` stop by itself: the end of a turn and the end of a text are stop ids."""
    stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<eos>")}
    stops |= set(_as_list(model.generation_config.eos_token_id))
    stops = sorted(s for s in stops if s is not None and s != tokenizer.unk_token_id)
    model.generation_config.eos_token_id = stops
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id


def _as_list(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
