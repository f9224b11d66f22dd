"""Train a reward model on preference pairs (Bradley-Terry).

Reads   a chat model's directory, pairs (`data_files`)
Writes  a sequence classifier with one label; metrics.jsonl, eval.json, run.json

    python -m rlhf.train_reward --config configs/tiny/reward.yaml
    accelerate launch --config_file configs/launch/cpu.yaml \
        -m rlhf.train_reward --config configs/tiny/reward.yaml
    deepspeed --num_gpus 2 rlhf/train_reward.py --config configs/tiny/reward.yaml \
        --deepspeed configs/deepspeed/zero2.json
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, set_seed
from trl import ModelConfig, RewardConfig, RewardTrainer

import stages
from pretrain.callbacks import watch
from pretrain.checkpoints import save_model, train_or_resume
from pretrain.eval import mean_with_interval, share_with_interval
from pretrain.hardware import choose_attention, set_up_process, training_defaults
from pretrain.optimizer import make_optimizer
from rlhf.data import fit_pairs, load_preferences
from rlhf.eval import finished_turns, load_reward_model, read_answers, score_conversations
from sft.data import DataSummary, split_rows
from sft.model import check_vocabulary
from sft.train import load_chat_tokenizer


@dataclass
class RewardArguments:
    """The pairs."""

    data_files: list[str] = field(default_factory=list, metadata={"help": "preference pairs"})
    test_files: list[str] = field(default_factory=list, metadata={"help": "held-out pairs"})
    validation_share: float = field(
        default=0.1, metadata={"help": "held out of data_files where there are no test_files"}
    )
    use_muon: bool = field(default=False, metadata={"help": "Muon for matrices"})


def main(args: RewardArguments, training_args: RewardConfig, model_args: ModelConfig) -> None:
    """Load data and model, train or resume, save, evaluate, record."""
    set_up_process(training_args)
    base = stages.require_input(model_args.model_name_or_path, "config.json", "tokenizer.json")
    run = stages.start_run(
        "reward",
        training_args.output_dir,
        [args, training_args, model_args],
        [base],
        args.data_files + args.test_files,
    )
    set_seed(training_args.seed)
    tokenizer = load_chat_tokenizer(base)
    train, test, summary = load_pairs(args, tokenizer, training_args.max_length)
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
        attn_implementation=model_args.attn_implementation or choose_attention(),
    )
    check_vocabulary(model, tokenizer)
    trainer = RewardTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        processing_class=tokenizer,
    )
    if args.use_muon:
        rate, decay = training_args.learning_rate, training_args.weight_decay
        trainer.optimizer = make_optimizer("muon", trainer.model, rate, decay)
    watch(trainer)
    train_or_resume(trainer, run)
    save_model(trainer)
    if trainer.is_world_process_zero():
        metrics = evaluate_reward_model(training_args.output_dir, list(test))
        metrics |= score_reference(training_args.output_dir, base)
        run.finish(metrics, data=summary.to_dict())


def load_pairs(args, tokenizer, max_length: int):
    """Train and test datasets of pairs, and the summary of what was read and dropped.

    Args:
        args: has `data_files`, `test_files` and `validation_share`.
        max_length: tokens; longer pairs are dropped and counted.
    """
    train, summary = load_preferences(args.data_files)
    if args.test_files:
        test, _ = load_preferences(args.test_files)
    else:
        train, test = split_rows(train, args.validation_share)
    train = fit_pairs(train, tokenizer, max_length, summary)
    test = fit_pairs(test, tokenizer, max_length, DataSummary())
    if stages.is_main_process():
        print(summary)
    return Dataset.from_list(train), Dataset.from_list(test), summary


def evaluate_reward_model(directory: str, pairs: list[dict]) -> dict[str, dict]:
    """Share of held-out pairs in the right order, and the mean margin chosen - rejected.

    The share also by `flaw`, where the pairs say what is bad about the rejected answer.
    """
    scorer = load_reward_model(directory)
    chosen, rejected = (
        score_conversations(*scorer, [pair["prompt"] + pair[side] for pair in pairs])
        for side in ("chosen", "rejected")
    )
    margins = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
    by_flaw = defaultdict(list)
    for pair, margin in zip(pairs, margins, strict=True):
        if pair.get("flaw"):
            by_flaw[f"pair_accuracy/{pair['flaw']}"].append(margin > 0)
    return {
        "pair_accuracy": share_with_interval(margin > 0 for margin in margins),
        "margin": mean_with_interval(margins, "reward-model score"),
    } | {name: share_with_interval(hits) for name, hits in sorted(by_flaw.items())}


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
    main(*stages.parse_args(classes, defaults=training_defaults()))
