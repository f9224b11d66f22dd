"""The guards of sft.eval, and what a reward model thinks of the answers.

    python -m rlhf.eval output/tiny/dpo --config configs/tiny/eval.yaml \
        --reward_model output/tiny/reward --reference output/tiny/sft
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import stages
from pretrain.eval import mean_with_interval
from sft.eval import evaluate_stage


def evaluate_policy(
    directory: str,
    eval_config: str | None,
    reward_model: str | None,
    reference: str | None,
) -> dict[str, dict]:
    """The guards of a policy and the reward-model scores of its answers, beside the reference's.

    Args:
        directory: the policy; its answers.jsonl is written there.
        eval_config: YAML of `sft.eval`; None measures nothing.
        reward_model: a reward model's directory, or None.
        reference: the model that the policy started from; its answers.jsonl has the same prompts.
    """
    metrics = evaluate_stage(directory, eval_config)
    answers = read_answers(directory, "chat") if metrics else []
    if not reward_model or not answers:
        return metrics
    scorer = load_reward_model(reward_model)
    scores = score_conversations(*scorer, [finished_turns(row) for row in answers])
    metrics["reward_score"] = mean_with_interval(scores, "reward-model score")
    before = read_answers(reference, "chat") if reference else []
    if [row["prompt"] for row in before] == [row["prompt"] for row in answers]:
        base = score_conversations(*scorer, [finished_turns(row) for row in before])
        gains = [new - old for new, old in zip(scores, base, strict=True)]
        metrics["reward_score/reference"] = mean_with_interval(base, "reward-model score")
        metrics["reward_score/gain"] = mean_with_interval(gains, "reward-model score")
    return metrics


def read_answers(directory: str, source: str) -> list[dict]:
    """The rows of one source in a stage's answers.jsonl; none where the file is not there."""
    path = Path(directory) / "answers.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["source"] == source]


def finished_turns(row: dict) -> list[dict[str, str]]:
    """The prompt's turns and the answer."""
    return [*row["prompt"], {"role": "assistant", "content": row["answer"]}]


def load_reward_model(directory: str) -> tuple[Any, Any]:
    """A reward model and its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


@torch.no_grad()
def score_conversations(
    model: Any, tokenizer: Any, conversations: Sequence[list[dict]], batch_size: int = 64
) -> list[float]:
    """The reward model's score of each whole conversation, in their order."""
    scores = []
    for start in range(0, len(conversations), batch_size):
        batch = tokenizer.apply_chat_template(
            list(conversations[start : start + batch_size]),
            padding=True,
            return_tensors="pt",
            return_dict=True,
            tokenizer_kwargs={"padding_side": "right"},
        ).to(model.device)
        scores += model(**batch).logits[:, 0].float().tolist()
    return scores


def main(args: argparse.Namespace) -> None:
    """Measure one directory and print the numbers."""
    for directory in (args.directory, args.reward_model, args.reference):
        if directory:
            stages.require_input(directory, "config.json", "tokenizer.json")
    metrics = evaluate_policy(args.directory, args.config, args.reward_model, args.reference)
    for name, m in metrics.items():
        print(
            f"{name:28} {m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}] {m['unit']} n={m['n']}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", help="a policy: the output of dpo, ppo, grpo or sft")
    parser.add_argument("--config", required=True, help="YAML with the keys of sft.eval")
    parser.add_argument("--reward_model", help="a directory made by rlhf.train_reward")
    parser.add_argument("--reference", help="the model the policy started from")
    main(parser.parse_args())
