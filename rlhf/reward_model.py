"""A reward model: one number for a whole conversation, whatever stands beside it in a batch."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from trl import ModelConfig, get_quantization_config

import stages
from pretrain.hardware import choose_attention
from sft.model import (
    add_chat_tokens,
    check_quantisation,
    check_vocabulary,
    count_real_positions,
    keep_unpacked,
    make_lora_config,
)
from sft.rendering import encode_messages

TOKENS_AT_ONCE = 16_384  # of a batch, padding included


def make_reward_model(model_args: ModelConfig, tokenizer: Any) -> PreTrainedModel:
    """A chat model whose output head is replaced by one new number, in 4 bits where asked for.

    Raises:
        ValueError: pad and eos are one token, tokenizer and model do not belong together, or
            4 bits without LoRA.
    """
    check_quantisation(model_args)
    check_pad_token(tokenizer)
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        quantization.llm_int8_skip_modules = ["score"]  # it is new, and trained whole
    model = AutoModelForSequenceClassification.from_pretrained(
        model_args.model_name_or_path,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        dtype=model_args.dtype or "float32",
        attn_implementation=model_args.attn_implementation or choose_attention(),
        quantization_config=quantization,
    )
    add_chat_tokens(model, tokenizer)
    check_vocabulary(model, tokenizer)
    keep_unpacked(model)
    return model


def check_pad_token(tokenizer: Any) -> None:
    """Raise a ValueError where the score would be read off the wrong token.

    The model takes the score from the right-most token that is not padding. If that is the end of
    a turn as well, it is read one token too early, and only in a padded batch.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"pad_token={tokenizer.pad_token!r} must be set and differ from "
            f"eos_token={tokenizer.eos_token!r}: a reward model reads its score at the last token "
            "that is not padding. Choose an unused special token as pad_token"
        )


def make_reward_lora(model_args: ModelConfig, tokenizer: Any) -> LoraConfig | None:
    """The LoRA of a recipe; the new head is trained whole. None for full fine-tuning."""
    config = make_lora_config(model_args, tokenizer)
    if config is not None:
        config.task_type = TaskType.SEQ_CLS
        config.modules_to_save = [*(config.modules_to_save or []), "score"]
    return config


def merge_reward_adapter(
    base: str | os.PathLike, adapter: Path, tokenizer: Any
) -> tuple[PreTrainedModel, dict[str, float]]:
    """Merge an adapter into the full-precision base: the plain model, and what the merge changed.

    Returns:
        The model, and {"merge_max_score_difference"} to the unmerged one on a few ids.
    """
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    )
    add_chat_tokens(model, tokenizer)
    probe = torch.arange(32)[None] % model.config.vocab_size
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        before = model(input_ids=probe).logits
        merged = model.merge_and_unload(safe_merge=True)
        difference = (merged(input_ids=probe).logits - before).abs().max().item()
    return merged, {"merge_max_score_difference": difference}


def require_judge(directory: str | os.PathLike, base: str | os.PathLike) -> Path:
    """Check, before hours of training, that a directory can pay or judge the answers of `base`.

    TRL gives a chat model a head of random numbers and pays by them, without a word.

    Raises:
        FileNotFoundError, ValueError: as `stages.require_input` and `require_same_tokenizer`; or it
            holds no model with one score.
    """
    found = stages.require_input(directory, "config.json", "tokenizer.json")
    stages.require_same_tokenizer(base, found)
    config = AutoConfig.from_pretrained(found)
    kinds = config.architectures or ["a model of no kind"]
    if config.num_labels != 1 or not any("ForSequenceClass" in kind for kind in kinds):
        raise ValueError(
            f"{directory} is no reward model but {', '.join(kinds)}, which gives no single score. "
            "Name a directory that python -m rlhf.train_reward has made"
        )
    return found


def load_reward_model(directory: str | os.PathLike) -> tuple[PreTrainedModel, Any]:
    """A reward model and its tokenizer, ready to score batches that are padded on either side.

    Raises:
        ValueError: the directory holds another model, whose head would be made up at random.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    check_pad_token(tokenizer)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    if missing := ", ".join(sorted(info["missing_keys"])):
        raise ValueError(
            f"{directory} is no reward model: its weights lack {missing}, which would be "
            "random. Name a directory that python -m rlhf.train_reward has made"
        )
    model.base_model.register_forward_pre_hook(count_real_positions, with_kwargs=True)
    return model.eval(), tokenizer


@torch.no_grad()
def score_conversations(
    model: Any, tokenizer: Any, conversations: Sequence[list[dict]], padding_side: str = "right"
) -> list[float]:
    """The reward model's score of each whole conversation, in their order.

    Args:
        conversations: lists of messages; those of similar length share a batch.
        padding_side: "right", as in training, or "left": the scores are the same.
    """
    ids = [encode_messages(messages, tokenizer) for messages in conversations]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    scores = [0.0] * len(ids)
    while order:
        size = max(1, TOKENS_AT_ONCE // len(ids[order[-1]]))
        chosen, order = order[-size:], order[:-size]
        batch = tokenizer.pad(
            {"input_ids": [ids[i] for i in chosen]}, return_tensors="pt", padding_side=padding_side
        ).to(model.device)
        found = model(**batch, use_cache=False).logits[:, 0].float().tolist()
        for i, score in zip(chosen, found, strict=True):
            scores[i] = score
    return scores
