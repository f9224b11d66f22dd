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

from datasets import Dataset
from transformers import AutoTokenizer, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer

import stages
from pretrain.callbacks import watch
from pretrain.checkpoints import check_saved_weights, move_into_place, save_model, train_or_resume
from pretrain.hardware import set_up_process, training_defaults
from pretrain.optimizer import make_optimizer
from sft.data import check_chat_template, load_conversations, render, split_rows
from sft.eval import evaluate_stage
from sft.model import complete_head, load_model, make_lora_config, merge_adapter, set_stop_tokens


@dataclass
class SFTArguments:
    """The conversations, and how the result is measured."""

    data_files: list[str] = field(default_factory=list, metadata={"help": "conversations"})
    validation_files: list[str] = field(default_factory=list, metadata={"help": "held-out ones"})
    validation_share: float = field(
        default=0.05,
        metadata={"help": "held out of data_files where there are no validation_files"},
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
    base = stages.require_input(model_args.model_name_or_path, "config.json", "tokenizer.json")
    files = args.data_files + args.validation_files
    run = stages.start_run(
        "sft", training_args.output_dir, [args, training_args, model_args], [base], files
    )
    set_seed(training_args.seed)
    tokenizer = load_chat_tokenizer(base, training_args.chat_template_path)
    train, validation, summary = load_data(args, tokenizer, training_args.max_length)
    training_args.chat_template_path = None  # it is in the tokenizer now
    trainer = SFTTrainer(
        model=load_model(model_args, tokenizer),
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        peft_config=make_lora_config(model_args, tokenizer),
    )
    complete_head(trainer.model)
    if args.use_muon:
        rate, decay = training_args.learning_rate, training_args.weight_decay
        trainer.optimizer = make_optimizer("muon", trainer.model, rate, decay)
    watch(trainer, early_stopping_patience=args.early_stopping_patience)
    train_or_resume(trainer, run)
    parity = save_chat_model(trainer, tokenizer, base)
    loss = trainer.evaluate()["eval_loss"]
    metrics = {"loss": {"value": loss, "n": len(validation), "unit": "nats/assistant token"}}
    if trainer.is_world_process_zero():
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
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(check_chat_template(tokenizer))
    return tokenizer


def load_data(args: SFTArguments, tokenizer, max_length: int):
    """Train and validation datasets of token ids, and the summary of what was read and dropped."""
    rows, summary = load_conversations(args.data_files)
    if args.validation_files:
        train, (validation, _) = rows, load_conversations(args.validation_files)
    else:
        train, validation = split_rows(rows, args.validation_share)
    validation, _ = render(validation, tokenizer, max_length)
    train, rendered = render(train, tokenizer, max_length)
    if stages.is_main_process():
        print(summary, rendered, sep="\n")
    rendered.layouts = summary.layouts
    return Dataset.from_list(train), Dataset.from_list(validation), rendered


def save_chat_model(trainer, tokenizer, base) -> dict[str, float]:
    """Save a plain model at the output's root; with LoRA the adapter beside it, merged."""
    output_dir = Path(trainer.args.output_dir)
    if not hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config"):
        set_stop_tokens(trainer.accelerator.unwrap_model(trainer.model), tokenizer)
        save_model(trainer)
        return {}
    save_model(trainer, output_dir / "adapter")
    if not trainer.is_world_process_zero():
        return {}
    merged, parity = merge_adapter(base, output_dir / "adapter")
    set_stop_tokens(merged, tokenizer)
    beside = output_dir / stages.BESIDE
    merged.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    check_saved_weights(merged, beside)
    move_into_place(beside, output_dir)
    return parity


if __name__ == "__main__":
    classes = [SFTArguments, SFTConfig, ModelConfig]
    main(*stages.parse_args(classes, defaults=training_defaults()))
