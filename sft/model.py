"""A stage's model, quantised or not, with its LoRA; and the way back to one plain model."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig, get_peft_config, get_quantization_config

from pretrain.hardware import choose_attention
from provenance import non_defaults
from sft.rendering import encode_prompt
from tokenizer.special_tokens import IM_END, IM_START, PAD

CHAT_TOKENS = (IM_START, IM_END)
EMBEDDINGS = {"wte", "embed_tokens", "embed_in", "lm_head", "embed_out"}  # as models name them
PROBES = ("Hi", "What is 12 + 30?", "你好，你是谁？", "Tell me about the river.")
PROBE_TOKENS = 32
# What transformers' and TRL's dataclasses have and no stage here reads, and what to do instead.
UNREAD = {
    "model_revision": "fetch that revision and name its directory",
    "model_init_kwargs": "the keys of ModelConfig say how a model is loaded",
    "eos_token": "the chat template says what ends a turn",
    "pad_token": "it is the tokenizer's own",
    "dataset_text_field": "the layouts of rows that are read are in docs/sft.md",
    "dataset_kwargs": "the layouts of rows that are read are in docs/sft.md",
}


def refuse_unread(*arguments: Any, **more: str) -> None:
    """Raise a ValueError for a setting that would be ignored without a word, or do harm.

    Args:
        arguments: the parsed dataclasses of a stage.
        more: what this stage does not read besides `UNREAD`, with what to do instead.
    """
    for one in arguments:
        for name in sorted(non_defaults(one).keys() & (UNREAD | more)):
            value = getattr(one, name)
            raise ValueError(
                f"{name}={getattr(value, 'value', value)!r}, which this stage does not read: "
                f"{(UNREAD | more)[name]}. Leave it out"
            )


def load_model(model_args: ModelConfig, tokenizer: Any) -> PreTrainedModel:
    """Load a causal language model, in 4 bits where the recipe says `load_in_4bit`.

    Raises:
        ValueError: tokenizer and model do not belong together, a reward model, or 4 bits without
            LoRA.
    """
    check_quantisation(model_args)
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        dtype=model_args.dtype or "float32",
        attn_implementation=model_args.attn_implementation or choose_attention(),
        quantization_config=get_quantization_config(model_args),
    )
    require_generator(model_args.model_name_or_path, model.config.architectures)
    add_chat_tokens(model, tokenizer)
    check_vocabulary(model, tokenizer)
    keep_unpacked(model)
    model.base_model.register_forward_pre_hook(count_real_positions, with_kwargs=True)
    return model


def check_quantisation(model_args: ModelConfig) -> None:
    """Raise a ValueError where a recipe asks for weights that cannot be trained."""
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(model_args, name) and not model_args.use_peft:
            raise ValueError(f"{name} needs use_peft: true; such weights cannot be trained")
    if model_args.load_in_4bit and model_args.dtype == "auto":
        raise ValueError("load_in_4bit with dtype: auto: name what is computed in, as float32")


def require_generator(directory: str | Path, architectures: list[str] | None) -> None:
    """Raise a ValueError where a model scores texts and writes none, as its config.json says."""
    if name := next((a for a in architectures or [] if "ForSequenceClass" in a), None):
        raise ValueError(
            f"{directory} is a {name}, a reward model or a classifier: it scores texts and writes "
            "none. Name a chat model's directory, or let it judge: python -m rlhf.judge A B "
            "--reward_model DIRECTORY"
        )


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


def add_chat_tokens(model: PreTrainedModel, tokenizer: Any) -> None:
    """Give the chat tokens that a tokenizer has and its model has not rows of their own.

    A new row is the mean of the old ones, always the same: the base that an adapter is merged into
    has to be the base that it was trained on. Other missing rows are left to `check_vocabulary`.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    new = tokenizer.convert_ids_to_tokens(list(range(rows, len(tokenizer))))
    if not new or not set(new) <= {PAD, *CHAT_TOKENS}:
        return
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for embeddings in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
        weight = embeddings.weight.data
        weight[rows:] = weight[:rows].mean(dim=0)


def check_vocabulary(model: PreTrainedModel, tokenizer: Any) -> None:
    """Raise a ValueError where the tokenizer makes ids that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer makes {len(tokenizer)} ids, the model knows {rows}: they do not belong "
            "together. Take both from the same directory"
        )


def keep_unpacked(model: PreTrainedModel) -> None:
    """Let the 4-bit layers of a CPU be in evaluation what they are in training.

    On AVX512-BF16 bitsandbytes packs the weights anew at the first forward pass without gradients,
    and they stay packed: training that goes on after an evaluation (of guards, of a reference) runs
    through a product that has no gradient. It also takes only widths that are a multiple of 64.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def context_length(model: PreTrainedModel) -> int:
    """Tokens that the model can read at once; no limit where its config names none."""
    return getattr(model.config, "max_position_embeddings", None) or 10**9


def check_max_length(max_length: int | None, model) -> int:
    """The longest row in tokens; None is the model's context, and more is a ValueError."""
    context = context_length(model)
    if max_length is not None and max_length > context:
        raise ValueError(
            f"max_length={max_length}: the model reads {context} tokens at most; set it to that"
        )
    return max_length or context


def make_lora_config(
    model_args: ModelConfig, tokenizer: Any, model: PreTrainedModel | None = None
) -> LoraConfig | None:
    """The LoRA of a recipe, None for full fine-tuning.

    The embedding rows of the chat tokens are trained as well: a base model has never seen them,
    and without it LoRA could not teach the model to stop. Of a `model` whose output layer is not
    tied to its embeddings the rows of both are.
    """
    config = read_lora_config(model_args)
    if config is None:
        return None
    config.task_type = TaskType.CAUSAL_LM  # whatever lora_task_type says: the stage knows its model
    config.trainable_token_indices = find_chat_tokens(tokenizer) or None
    named = {*(config.modules_to_save or []), *(model_args.lora_target_modules or [])}
    if config.trainable_token_indices and (named := ", ".join(sorted(EMBEDDINGS & named))):
        raise ValueError(
            f"lora_modules_to_save or lora_target_modules has {named}: of it the chat tokens' rows "
            "are trained already, and PEFT cannot train more of it as well. Leave it out, or train "
            "all of the model: use_peft: false"
        )
    is_tied = model is None or model.config.tie_word_embeddings
    if config.trainable_token_indices and not is_tied:
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        names = [name.split(".")[-1] for name, one in model.named_modules() if one in layers]
        config.trainable_token_indices = dict.fromkeys(names, config.trainable_token_indices)
    return config


def read_lora_config(model_args: ModelConfig) -> LoraConfig | None:
    """TRL's reading of a recipe's LoRA; without `lora_target_modules` on all linear layers."""
    config = get_peft_config(model_args)
    # A list of one is what the parser makes of the word, and would be a module's name.
    if config and model_args.lora_target_modules in (None, [], ["all-linear"]):
        config.target_modules = "all-linear"
    return config


def find_chat_tokens(tokenizer: Any) -> list[int]:
    """The ids of the tokens that open and close a turn, as far as the tokenizer has them."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in CHAT_TOKENS if token in vocabulary]


def complete_head(model: PreTrainedModel | PeftModel) -> None:
    """Mend what TRL's trainers and PEFT leave half done; call it on a new trainer's model.

    An output head with trainable rows gets the `bias` that TRL's fused loss looks for: PEFT's
    wrapper answers for `weight` (with the trained rows in place) and nothing else. And the adapter
    of a 4-bit model becomes fp32: TRL makes it bf16, in which small steps are rounded away, and
    PEFT makes it fp32 again when a checkpoint is loaded, so that no resumed run could be exact.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None
    restore_precision(model)


def restore_precision(model: PreTrainedModel | PeftModel) -> None:
    """Make what is trained of an adapter model fp32; see `complete_head`."""
    if isinstance(model, PeftModel):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def merge_adapter(
    base: str | os.PathLike,
    adapter: str | os.PathLike,
    tokenizer: Any,
    trained: PreTrainedModel | PeftModel | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Merge an adapter into the full-precision base, and measure what the merge changed.

    A 4-bit base is never merged into: its weights would be rounded once more. The base is read
    again in fp32 instead.

    Args:
        base: the directory the adapter was trained from.
        adapter: a PEFT adapter.
        tokenizer: of the chat model; a few prompts are answered greedily to compare by.
        trained: the 4-bit model as it was trained, to compare with as well.

    Returns:
        The plain model, and for run.json: "merge_max_logit_difference" to the adapter on the same
        fp32 base, "merge_greedy_equal" (share of the prompts answered with the same tokens), the
        same two "_4bit" where `trained` is given, and "chat_token_movement": by token, the length
        of the way that its embedding went, relative to where it began.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    require_generator(base, model.config.architectures)
    add_chat_tokens(model, tokenizer)
    chat_tokens = find_chat_tokens(tokenizer)
    start = model.get_input_embeddings().weight.detach()[chat_tokens].clone()
    model = PeftModel.from_pretrained(model, Path(adapter)).eval()
    answers = answer_probes(model, tokenizer)
    logits = read_logits(model, answers)
    merged = model.merge_and_unload(safe_merge=True)
    said, merged_logits = answer_probes(merged, tokenizer), read_logits(merged, answers)
    parity: dict[str, Any] = {
        "merge_max_logit_difference": largest_difference(logits, merged_logits),
        "merge_greedy_equal": share_equal(answers, said),
    }
    if trained is not None:
        was_training = trained.training
        trained.eval()
        difference = largest_difference(read_logits(trained, answers), merged_logits)
        parity["merge_max_logit_difference_4bit"] = difference
        parity["merge_greedy_equal_4bit"] = share_equal(answer_probes(trained, tokenizer), said)
        trained.train(was_training)
    end = merged.get_input_embeddings().weight.detach()[chat_tokens]
    moved = ((end - start).norm(dim=1) / start.norm(dim=1)).tolist()
    names = tokenizer.convert_ids_to_tokens(chat_tokens)
    parity["chat_token_movement"] = dict(zip(names, (round(x, 4) for x in moved), strict=True))
    return merged, parity


@torch.no_grad()
def answer_probes(model: Any, tokenizer: Any) -> list[list[int]]:
    """Each probe's ids with the model's greedy answer behind them."""
    answers = []
    for text in PROBES:
        prompt = torch.tensor([encode_prompt([{"role": "user", "content": text}], tokenizer)])
        room = context_length(model) - prompt.shape[1]
        answers += model.generate(
            input_ids=prompt.to(model.device),
            attention_mask=torch.ones_like(prompt).to(model.device),
            max_new_tokens=max(1, min(PROBE_TOKENS, room)),
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ).tolist()
    return answers


@torch.no_grad()
def read_logits(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    """The logits (T, vocabulary) of each row of ids, read alone."""
    return [model(torch.tensor([ids], device=model.device)).logits[0].float() for ids in rows]


def largest_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest absolute difference between two models' logits."""
    pairs = zip(ours, theirs, strict=True)
    return max((a - b.to(a.device)).abs().max().item() for a, b in pairs)


def share_equal(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of the rows of ids that are the same."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


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
