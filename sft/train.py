"""Supervised fine-tuning: a base model learns to answer in the chat format.

Reads   a base model's directory, conversations (`data_files`)
Writes  a chat model that from_pretrained loads (LoRA merged, the adapter under adapter/);
        answers.jsonl, metrics.jsonl, eval.json, run.json

    python -m sft.train --config configs/tiny/sft.yaml
    accelerate launch --config_file configs/launch/cpu.yaml \
        -m sft.train --config configs/tiny/sft.yaml
    deepspeed --num_gpus 2 sft/train.py --config configs/tiny/sft.yaml \
        --deepspeed configs/deepspeed/zero2.json
"""

from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, set_seed
from trl import ModelConfig, SFTConfig

import stages
from pretrain.callbacks import watch
from pretrain.checkpoints import check_saved_weights, move_into_place, save_model, train_or_resume
from pretrain.hardware import set_up_process, training_defaults
from pretrain.optimizer import make_optimizer
from sft.data import (
    DataSummary,
    get_first_user,
    load_conversations,
    load_mixture,
    split_rows,
)
from sft.eval import evaluate_stage, load_for_generation, read_eval_config
from sft.loss import ChatTrainer, held_out_loss
from sft.model import (
    check_max_length,
    load_model,
    make_lora_config,
    merge_adapter,
    refuse_unread,
    set_stop_tokens,
)
from sft.rendering import check_chat_template, find_end_token, mark_trained, render
from tokenizer.mixture import parse_shares
from tokenizer.special_tokens import IM_END, IM_START, PAD

UNUSED = "<|endoftext|>"  # what many chat models have and no longer say


@dataclass
class SFTArguments:
    """The conversations, and how the result is measured."""

    data_files: list[str] = field(
        default_factory=list, metadata={"help": "conversations; name@share, ... for a mixture"}
    )
    validation_files: list[str] = field(
        default_factory=list, metadata={"help": "held out while training"}
    )
    test_files: list[str] = field(default_factory=list, metadata={"help": "held out to the end"})
    validation_share: float = field(
        default=0.05,
        metadata={"help": "held out of data_files where there are no validation_files"},
    )
    test_share: float = field(
        default=0.0, metadata={"help": "the same for test_files; 0: measure on validation"}
    )
    eval_config: str | None = field(
        default=None, metadata={"help": "YAML of sft.eval: the guards, the same for every stage"}
    )
    use_muon: bool = field(
        default=False, metadata={"help": "Muon for matrices, those of LoRA too, instead of `optim`"}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "evaluations in a row without a better one, then stop"}
    )


def main(args: SFTArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Load data and model, train or resume, merge and save, evaluate, record."""
    set_up_process(training_args)
    read_eval_config(args.eval_config)
    refuse_unread(training_args, model_args)
    base = stages.require_input(model_args.model_name_or_path, "config.json", "tokenizer.json")
    files = [*parse_shares(args.data_files), *args.validation_files, *args.test_files]
    run = stages.start_run(
        "sft", training_args.output_dir, [args, training_args, model_args], [base], files
    )
    set_seed(training_args.seed)
    tokenizer = load_chat_tokenizer(base, training_args.chat_template_path)
    training_args.chat_template_path = None  # it is in the tokenizer now
    training_args.assistant_only_loss = False  # the rows' own masks say it, and TRL asks for text
    model = load_model(model_args, tokenizer)
    training_args.max_length = check_max_length(training_args.max_length, model)
    splits, summary = load_data(args, tokenizer, training_args)
    trainer = ChatTrainer(
        model=model,
        args=training_args,
        train_dataset=Dataset.from_list(splits["train"]),
        eval_dataset=Dataset.from_list(splits["validation"]),
        processing_class=tokenizer,
        peft_config=make_lora_config(model_args, tokenizer, model),
    )
    if args.use_muon:
        rate, decay = training_args.learning_rate, training_args.weight_decay
        trainer.optimizer = make_optimizer("muon", trainer.model, rate, decay)
    watch(trainer, early_stopping_patience=args.early_stopping_patience)
    train_or_resume(trainer, run)
    parity = save_chat_model(trainer, tokenizer, base)
    if trainer.is_world_process_zero():
        model, _ = load_for_generation(training_args.output_dir)
        metrics = {"loss": held_out_loss(model, splits["test"] or splits["validation"])}
        metrics |= evaluate_stage(training_args.output_dir, args.eval_config)
        run.finish(metrics, data=summary.to_dict(), **parity)


def load_chat_tokenizer(directory, template: str | None = None):
    """The base's tokenizer with the end of a turn as its eos: what generation must stop at.

    Args:
        directory: where the tokenizer is.
        template: a jinja file, for a tokenizer that has no chat template.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if template:
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        add_missing_tokens(tokenizer)
    end = check_chat_template(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def add_missing_tokens(tokenizer) -> None:
    """Give a tokenizer of somebody else the control tokens that a given template writes.

    GPT-2's has none of a chat, and many have no pad token of their own, which would be masked where
    it ends a turn: one that stands unused is taken, else `<pad>` is added.
    """
    known = tokenizer.get_vocab()
    new = [t for t in (IM_START, IM_END) if t in tokenizer.chat_template and t not in known]
    tokenizer.add_special_tokens(
        {"extra_special_tokens": new}, replace_extra_special_tokens=False
    )
    stops = (find_end_token(tokenizer), tokenizer.eos_token_id)
    if tokenizer.pad_token_id in (None, *stops):
        is_unused = known.get(UNUSED, stops[0]) not in stops
        tokenizer.add_special_tokens({"pad_token": UNUSED if is_unused else PAD})


def load_data(args: SFTArguments, tokenizer, training_args: SFTConfig):
    """Rows of token ids by split, and the summary of what was read and dropped.

    The main process prints the summary and one row as the model sees it.
    """
    train, summary = load_mixture(args.data_files, training_args.seed)
    splits = {"train": train, "validation": [], "test": []}
    held_out = {"validation": DataSummary(), "test": DataSummary()}
    files = {"validation": args.validation_files, "test": args.test_files}
    shares = {"validation": args.validation_share, "test": args.test_share}
    for split, names in files.items():
        if names:
            splits[split], held_out[split] = load_conversations(names)
            shares[split] = 0
    wanted = {name: share for name, share in shares.items() if share or name == "validation"}
    if args.validation_files:
        del wanted["validation"]
    train, *cut = split_rows(train, *wanted.values())
    splits |= {"train": train} | dict(zip(wanted, cut, strict=True))
    seen = {get_first_user(row) for row in train}
    max_length = training_args.max_length
    for split in ("validation", "test"):
        if splits[split]:
            overlap = sum(get_first_user(row) in seen for row in splits[split])
            splits[split], kept = render(splits[split], tokenizer, max_length)
            held_out[split].add_rendered(kept)
            describe_held_out(split, held_out[split], overlap)
    splits["train"], rendered = render(splits["train"], tokenizer, max_length)
    if stages.is_main_process():
        sizes = ", ".join(f"{name} {len(rows):,}" for name, rows in splits.items())
        print(summary, f"split    {sizes}", sep="\n")
        print(rendered, "example  with what is trained in [[brackets]]:", sep="\n")
        print(indent(mark_trained(splits["train"][0], tokenizer), " " * 9), flush=True)
    summary.add_rendered(rendered)
    return splits, summary


def describe_held_out(split: str, summary: DataSummary, overlap: int) -> None:
    """Say what was dropped of held-out rows, and how many have a prompt that is trained on."""
    if not stages.is_main_process():
        return
    for reason, sources in summary.dropped.items():
        print(f"dropped  {len(sources):,} x {split}: {reason} (first: {sources[0]})")
    if overlap:
        print(f"seen     {overlap:,} {split} rows have a prompt that is trained on, too")


def save_chat_model(trainer, tokenizer, base) -> dict[str, Any]:
    """Save a plain model at the output's root; with LoRA the adapter beside it, merged.

    Returns what `merge_adapter` measured, in the main process.
    """
    output_dir = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "peft_config"):
        set_stop_tokens(model, tokenizer)
        save_model(trainer)
        return {}
    save_model(trainer, output_dir / "adapter")
    if not trainer.is_world_process_zero():
        return {}
    four_bits = getattr(model.get_base_model(), "is_loaded_in_4bit", False)
    merged, parity = merge_adapter(
        base, output_dir / "adapter", tokenizer, trained=model if four_bits else None
    )
    print("; ".join(f"{name}: {value}" for name, value in parity.items()), flush=True)
    set_stop_tokens(merged, tokenizer)
    save_merged(merged, tokenizer, output_dir)
    return parity


def save_merged(model, tokenizer, output_dir: Path) -> None:
    """Save a merged model with its tokenizer, whole or not at all, and compare the files."""
    beside = output_dir / stages.BESIDE
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    check_saved_weights(model, beside)
    move_into_place(beside, output_dir)


if __name__ == "__main__":
    classes = [SFTArguments, SFTConfig, ModelConfig]
    with stages.plain_errors():
        main(*stages.parse_args(classes, defaults=training_defaults()))
