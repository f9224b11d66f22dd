"""Train a reward model on preference pairs (Bradley-Terry).

Reads   a chat model's directory, pairs (`data_files`)
Writes  a sequence classifier with one label (LoRA merged, the adapter under adapter/);
        metrics.jsonl, curves.png, margins.png, eval.json, run.json

    python -m rlhf.train_reward --config configs/tiny/reward.yaml
    accelerate launch --config_file configs/launch/cpu.yaml \
        -m rlhf.train_reward --config configs/tiny/reward.yaml
    deepspeed --num_gpus 2 rlhf/train_reward.py --config configs/tiny/reward.yaml \
        --deepspeed configs/deepspeed/zero2.json
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed
from trl import ModelConfig, RewardConfig, RewardTrainer

import stages
from pretrain.callbacks import watch
from pretrain.checkpoints import save_model, train_or_resume
from pretrain.eval import mean_with_interval
from pretrain.hardware import set_up_process, training_defaults
from pretrain.optimizer import make_optimizer
from rlhf.calibration import draw_pairs, measure_pairs
from rlhf.eval import finished_turns, read_answers
from rlhf.pairs import load_pairs
from rlhf.reward_model import (
    load_reward_model,
    make_reward_lora,
    make_reward_model,
    merge_reward_adapter,
    score_conversations,
)
from sft.model import check_max_length, refuse_unread, restore_precision
from sft.train import load_chat_tokenizer, save_merged


@dataclass
class RewardArguments:
    """The pairs."""

    data_files: list[str] = field(default_factory=list, metadata={"help": "preference pairs"})
    test_files: list[str] = field(default_factory=list, metadata={"help": "held-out pairs"})
    validation_share: float = field(
        default=0.1, metadata={"help": "held out of data_files where there are no test_files"}
    )
    allow_dropped_pairs: bool = field(
        default=False, metadata={"help": "go on where more than 5 % of the pairs are dropped"}
    )
    use_muon: bool = field(default=False, metadata={"help": "Muon for matrices"})


def main(args: RewardArguments, training_args: RewardConfig, model_args: ModelConfig) -> None:
    """Load data and model, train or resume, save, evaluate, record."""
    set_up_process(training_args)
    refuse_unread(training_args, model_args, label_smoothing_factor="Bradley-Terry has none")
    base = stages.require_input(model_args.model_name_or_path, "config.json", "tokenizer.json")
    run = stages.start_run(
        "reward",
        training_args.output_dir,
        [args, training_args, model_args],
        [base],
        args.data_files + args.test_files,
    )
    set_seed(training_args.seed)
    tokenizer = load_chat_tokenizer(base, training_args.chat_template_path)
    training_args.chat_template_path = None  # it is in the tokenizer now
    model = make_reward_model(model_args, tokenizer)
    training_args.max_length = check_max_length(training_args.max_length, model)
    train, test, data = load_pairs(args, tokenizer, training_args.max_length)
    trainer = RewardTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        peft_config=make_reward_lora(model_args, tokenizer),
    )
    restore_precision(trainer.model)
    if args.use_muon:
        rate, decay = training_args.learning_rate, training_args.weight_decay
        trainer.optimizer = make_optimizer("muon", trainer.model, rate, decay)
    watch(trainer)
    explain_logs()
    train_or_resume(trainer, run)
    parity = save_reward_model(trainer, tokenizer, base)
    if trainer.is_world_process_zero():
        metrics = evaluate_reward_model(training_args.output_dir, list(test))
        metrics |= score_reference(training_args.output_dir, base)
        run.finish(metrics, data=data, **parity)


def explain_logs() -> None:
    """Say once what the logged numbers mean."""
    if stages.is_main_process():
        print(
            "logged   loss: -log sigmoid(margin), 0.693 is chance; accuracy: share of pairs with "
            "the chosen answer above the rejected; margin: chosen score - rejected score"
        )


def save_reward_model(trainer, tokenizer, base) -> dict[str, float]:
    """Save a plain sequence classifier at the output's root; with LoRA merged, the adapter beside.

    Returns:
        What the merge changed; nothing where there was none.
    """
    if not hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config"):
        save_model(trainer)
        return {}
    adapter = Path(trainer.args.output_dir, "adapter")
    save_model(trainer, adapter)
    if not trainer.is_world_process_zero():
        return {}
    merged, parity = merge_reward_adapter(base, adapter, tokenizer)
    save_merged(merged, tokenizer, adapter.parent)
    return parity


def evaluate_reward_model(directory: str, pairs: list[dict]) -> dict[str, dict]:
    """Everything of `rlhf.calibration` on held-out pairs, and its picture margins.png."""
    model, tokenizer = load_reward_model(directory)
    sides = ("chosen", "rejected")
    chosen, rejected = (
        score_conversations(model, tokenizer, [pair["prompt"] + pair[side] for pair in pairs])
        for side in sides
    )
    lengths = [
        tuple(len(tokenizer(pair[side][0]["content"])["input_ids"]) for side in sides)
        for pair in pairs
    ]
    metrics = measure_pairs(chosen, rejected, lengths, [pair.get("flaw") for pair in pairs])
    answers = [length for length, _ in lengths] + [length for _, length in lengths]
    draw_pairs(directory, metrics, [*chosen, *rejected], answers)
    return metrics


def score_reference(directory: str, base) -> dict[str, dict]:
    """The score of the chat model's own held-out answers: where the alignment starts from."""
    answers = read_answers(base, "chat")
    if not answers:
        return {}
    scores = score_conversations(
        *load_reward_model(directory), [finished_turns(row) for row in answers]
    )
    return {"reward_score/reference": mean_with_interval(scores, "reward-model score")}


if __name__ == "__main__":
    classes = [RewardArguments, RewardConfig, ModelConfig]
    with stages.plain_errors():
        main(*stages.parse_args(classes, defaults=training_defaults()))
