"""A reward model as the judge of two directories' answers, where there is no server to ask.

    python -m rlhf.judge output/tiny/dpo output/tiny/sft --reward_model output/tiny/reward

The answer with the higher score wins. Reads DIR/answers.jsonl, adds `reward_win_rate/<second>` to
the first directory's eval.json. A policy that was trained on this reward model wins more than it
should: compare with a language model's verdict (`python -m sft.judge`).
"""

import argparse
from pathlib import Path

import stages
from pretrain.eval import mean_with_interval, print_metrics, save_metrics
from rlhf.eval import finished_turns
from rlhf.reward_model import load_reward_model, score_conversations
from sft.judge import read_judged


def main(args: argparse.Namespace) -> None:
    """Score both directories' answers, print and keep the win rate of the first."""
    stages.require_input(args.reward_model, "config.json", "tokenizer.json")
    rows = read_judged([args.first, args.second], args.max_rows)
    scorer = load_reward_model(args.reward_model)
    ours, theirs = (
        score_conversations(*scorer, [finished_turns(row) for row in side])
        for side in zip(*rows, strict=True)
    )
    same = [one["answer"] == other["answer"] for one, other in rows]  # whatever rounding says
    gains = [(a - b) * (not equal) for a, b, equal in zip(ours, theirs, same, strict=True)]
    name = Path(args.second).resolve().name
    wins = [0.5 + 0.5 * ((gain > 0) - (gain < 0)) for gain in gains]
    metrics = {
        f"reward_win_rate/{name}": mean_with_interval(wins, "share"),
        f"reward_gain/{name}": mean_with_interval(gains, "reward-model score"),
    }
    metrics = {key: value | {"judge": args.reward_model} for key, value in metrics.items()}
    save_metrics(args.first, metrics)
    print_metrics(metrics)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("first", help="a directory whose answers are judged")
    parser.add_argument("second", help="the one it is compared with")
    parser.add_argument("--reward_model", required=True, help="made by rlhf.train_reward")
    parser.add_argument("--max_rows", type=int, default=500, help="conversations, the first ones")
    with stages.plain_errors():
        main(parser.parse_args())
