"""The guards of sft.eval, and what a reward model thinks of the answers.

    python -m rlhf.eval output/tiny/dpo --config configs/tiny/eval.yaml \
        --reward_model output/tiny/reward --reference output/tiny/sft
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import stages
from pretrain.callbacks import say
from pretrain.eval import mean_with_interval
from rlhf.calibration import measure_pairs
from rlhf.guards import report_falls
from rlhf.pairs import tokenize_pairs
from rlhf.reward_model import load_reward_model, score_conversations
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
    if reward_model and answers:
        metrics |= score_answers(answers, reward_model, reference)
    if fallen := report_falls(reference, metrics):
        say(fallen)
    return metrics


def score_answers(answers: list[dict], reward_model: str, reference: str | None) -> dict[str, dict]:
    """Reward-model scores of answers, and the gain over the reference's to the same prompts."""
    scorer = load_reward_model(reward_model)
    scores = score_conversations(*scorer, [finished_turns(row) for row in answers])
    metrics = {"reward_score": mean_with_interval(scores, "reward-model score")}
    before = read_answers(reference, "chat") if reference else []
    if [row["prompt"] for row in before] == [row["prompt"] for row in answers]:
        base = score_conversations(*scorer, [finished_turns(row) for row in before])
        gains = [new - old for new, old in zip(scores, base, strict=True)]
        metrics["reward_score/reference"] = mean_with_interval(base, "reward-model score")
        metrics["reward_score/gain"] = mean_with_interval(gains, "reward-model score")
    return metrics


def evaluate_implicit_rewards(
    directory: str, reference: str, pairs: list[dict], beta: float
) -> dict[str, dict]:
    """What a policy thinks of held-out pairs: beta x (log-probability - the reference's).

    Both models are read from their directories in full precision: what DPO's log says of a
    quantised or half-precision training, measured on what was saved.

    Returns:
        The numbers of `rlhf.calibration`, its accuracy as `implicit_pair_accuracy`, and the mean
        implicit reward of either side.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenized = tokenize_pairs(pairs, tokenizer)
    lengths = [(len(c) - len(prompt), len(r) - len(prompt)) for prompt, c, r in tokenized]
    logps = []
    for name in (directory, reference):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        logps.append([answer_logps(model, tokenized, side) for side in (1, 2)])
    chosen, rejected = (
        [beta * (new - old) for new, old in zip(*sides, strict=True)]
        for sides in zip(*logps, strict=True)
    )
    metrics = measure_pairs(chosen, rejected, lengths, [pair.get("flaw") for pair in pairs])
    metrics = {k.replace("pair_acc", "implicit_pair_acc"): v for k, v in metrics.items()}
    metrics["margin"]["unit"] = "implicit reward"
    metrics["rewards/chosen"] = mean_with_interval(chosen, "implicit reward")
    metrics["rewards/rejected"] = mean_with_interval(rejected, "implicit reward")
    return metrics


@torch.no_grad()
def answer_logps(model: Any, tokenized: list[tuple[list[int], ...]], side: int) -> list[float]:
    """Log-probability of one side's answer, in nats, for each of `rlhf.pairs.tokenize_pairs`.

    One pair at a time: there is no padding that could matter, and no large block of logits.
    """
    found = []
    for pair in tokenized:
        prompt, ids = pair[0], torch.tensor([pair[side]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        answer = ids[0, len(prompt) :, None]
        found.append(logits.log_softmax(dim=-1).gather(1, answer).sum().item())
    return found


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
    with stages.plain_errors():
        main(parser.parse_args())
