"""Train a classifier of texts: a base model with a head that reads its last token.

Reads   a base model's directory, rows with a text and a label (`data_files`)
Writes  a sequence classifier that from_pretrained loads (LoRA merged, the adapter under adapter/);
        metrics.jsonl, eval.json, run.json

    python -m sft.train_classifier --config configs/tiny/classifier.yaml
    accelerate launch --config_file configs/launch/cpu.yaml \
        -m sft.train_classifier --config configs/tiny/classifier.yaml
    deepspeed --num_gpus 2 sft/train_classifier.py --config configs/tiny/classifier.yaml \
        --deepspeed configs/deepspeed/zero2.json
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import ModelConfig

import stages
from pretrain.callbacks import watch
from pretrain.checkpoints import save_model, train_or_resume
from pretrain.hardware import choose_attention, set_up_process, training_defaults
from sft.classify import classify, load_classifier
from sft.labels import SPLITS, Labelled, load_splits, to_columns
from sft.metrics import measure_labels
from sft.model import check_vocabulary, context_length, read_lora_config, refuse_unread
from sft.train import save_merged


@dataclass
class ClassifierArguments:
    """The rows, and what of the model is trained (`use_peft: true`: LoRA; neither: all of it)."""

    data_files: list[str] = field(default_factory=list, metadata={"help": "texts with labels"})
    validation_files: list[str] = field(default_factory=list, metadata={"help": "held-out rows"})
    test_files: list[str] = field(default_factory=list, metadata={"help": "rows measured on"})
    text_column: str | None = field(default=None, metadata={"help": "default: text, sentence, ..."})
    label_column: str | None = field(default=None, metadata={"help": "default: label, ..."})
    validation_share: float = field(default=0.1, metadata={"help": "where no validation_files"})
    test_share: float = field(default=0.2, metadata={"help": "where no test_files"})
    balance: bool = field(default=True, metadata={"help": "as many training rows of each label"})
    max_length: int | None = field(default=None, metadata={"help": "tokens; default: the context"})
    freeze: bool = field(
        default=False, metadata={"help": "train the head, the last block and the final norm only"}
    )


def main(
    args: ClassifierArguments, training_args: TrainingArguments, model_args: ModelConfig
) -> None:
    """Load data and model, train or resume, merge and save, evaluate, record."""
    set_up_process(training_args)
    no_bits = "the head and what is trained of the model are in full precision"
    refuse_unread(training_args, model_args, load_in_4bit=no_bits, load_in_8bit=no_bits)
    base = stages.require_input(model_args.model_name_or_path, "config.json", "tokenizer.json")
    files = dict(zip(SPLITS, (args.data_files, args.validation_files, args.test_files)))  # noqa: B905
    run = stages.start_run(
        "classifier", training_args.output_dir, [args, training_args, model_args], [base],
        sum(files.values(), []),
    )  # fmt: skip
    set_seed(training_args.seed)
    columns = (args.text_column, args.label_column)
    shares = (args.validation_share, args.test_share)
    rows, summary = load_splits(files, columns, shares, args.balance, training_args.seed)
    labels = list(summary.splits["train"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_base(base, tokenizer, labels, args, model_args)
    if stages.is_main_process():
        print(summary, describe_model(model), sep="\n")
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=encode(rows["train"], tokenizer, labels),
        eval_dataset=encode(rows["validation"], tokenizer, labels),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_loss_func=partial(mean_loss, smoothing=training_args.label_smoothing_factor),
        compute_metrics=lambda found: {"accuracy": float((found[0].argmax(-1) == found[1]).mean())},
    )
    watch(trainer)
    train_or_resume(trainer, run)
    save_classifier(trainer, base, tokenizer)
    if trainer.is_world_process_zero():
        metrics = evaluate_classifier(training_args.output_dir, rows["test"])
        run.finish(metrics, data=vars(summary))


def mean_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None, smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy, the mean over all rows of an optimizer step.

    transformers' classifiers take the mean of what they see, while its Trainer counts on a sum
    divided by `num_items_in_batch`: with accumulation or several processes the loss, and with it
    every gradient, would be as many times too large.
    """
    loss = torch.nn.functional.cross_entropy(
        outputs.logits.float(), labels, reduction="sum", label_smoothing=smoothing
    )
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def load_base(
    base: Any, tokenizer: Any, labels: list[str], args: ClassifierArguments, model_args: ModelConfig
) -> PreTrainedModel | PeftModel:
    """The base model with a new head, and the part of it trainable that the recipe asks for.

    Sets the tokenizer's `model_max_length`, which goes with the classifier, and its pad token where
    it has none: the last token that is not padding is what the head reads.
    """
    if args.freeze and model_args.use_peft:
        raise ValueError("freeze and use_peft are two ways to train less: choose one of them")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = make_classifier(base, tokenizer, labels, model_args)
    check_vocabulary(model, tokenizer)
    limit = min(context_length(model), tokenizer.model_max_length)
    if args.max_length is not None and args.max_length > limit:
        raise ValueError(f"max_length={args.max_length}: the model reads {limit} tokens at most")
    tokenizer.model_max_length = args.max_length or limit
    if args.freeze:
        freeze_all_but_the_end(model)
    config = read_lora_config(model_args)
    if config is None:
        return model
    config.task_type = TaskType.SEQ_CLS
    config.modules_to_save = [*(config.modules_to_save or []), "score"]
    return get_peft_model(model, config)


def make_classifier(
    base: Any, tokenizer: Any, labels: list[str], model_args: ModelConfig | None = None
) -> PreTrainedModel:
    """The base model's blocks under a new head, one output a label."""
    model_args = model_args or ModelConfig()
    return AutoModelForSequenceClassification.from_pretrained(
        base,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        pad_token_id=tokenizer.pad_token_id,
        dtype=model_args.dtype or "float32",
        attn_implementation=model_args.attn_implementation or choose_attention(),
    )


def freeze_all_but_the_end(model: PreTrainedModel) -> None:
    """Leave the head, the last block and the final norm trainable.

    The final norm is found by its place: the modules behind the list of blocks.
    """
    backbone = model.base_model
    children = list(backbone.children())
    blocks = next(one for one in children if isinstance(one, torch.nn.ModuleList))
    behind = children[children.index(blocks) + 1 :]
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    for module in (blocks[-1], *behind):
        module.requires_grad_(True)


def describe_model(model: Any) -> str:
    """How much of the model is trained."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained, total = sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
    return f"trained  {trained:,} of {total:,} parameters ({trained / total:.1%})"


def encode(rows: list[Labelled], tokenizer: Any, labels: list[str]) -> Dataset:
    """A dataset of `input_ids`, cut at the tokenizer's `model_max_length`, and `labels`."""
    columns = to_columns(rows, labels)
    ids = tokenizer(columns["text"], truncation=True, split_special_tokens=True)["input_ids"]
    tokenizer.backend_tokenizer.no_truncation()  # it would be saved: another tokenizer.json
    return Dataset.from_dict({"input_ids": ids, "labels": columns["labels"]})


def save_classifier(trainer: Trainer, base: Any, tokenizer: Any) -> None:
    """Save a plain classifier at the output's root; with LoRA the adapter beside it, merged."""
    output_dir = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        save_model(trainer)
        return
    save_model(trainer, output_dir / "adapter")
    if not trainer.is_world_process_zero():
        return
    labels = list(model.config.label2id)
    plain = make_classifier(base, tokenizer, labels)
    merged = PeftModel.from_pretrained(plain, output_dir / "adapter").merge_and_unload(True)
    save_merged(merged, tokenizer, output_dir)


def evaluate_classifier(directory: str, rows: list[Labelled]) -> dict[str, dict]:
    """Accuracy, F1 and the confusion matrix of a saved classifier on labelled rows."""
    model, tokenizer = load_classifier(directory)
    shares = classify(model, tokenizer, [row.text for row in rows])
    said = [model.config.id2label[max(range(len(one)), key=one.__getitem__)] for one in shares]
    return measure_labels([row.label for row in rows], said, list(model.config.label2id))


if __name__ == "__main__":
    classes = [ClassifierArguments, TrainingArguments, ModelConfig]
    with stages.plain_errors():
        main(*stages.parse_args(classes, defaults=training_defaults()))
