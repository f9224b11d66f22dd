"""What pretraining a recipe will cost on given GPUs, before anything is bought or downloaded.

    python scripts/plan.py configs/gpt2-100m --gpus 8 --memory 80 --flops_per_second 1.2e14
    python scripts/plan.py configs/tiny --metrics output/tiny/pretrain/metrics.jsonl

Without --gpus it plans for this machine, as `python -m pretrain.train --dry_run true` does.
"""

import argparse
from pathlib import Path

from transformers import TrainingArguments

import stages
from pretrain.attention import PACKED
from pretrain.hardware import quiet_logs, training_defaults
from pretrain.plan import (
    Machine,
    Plan,
    find_sizes,
    format_plan,
    format_time,
    make_plan,
    read_throughput,
)
from pretrain.train import PretrainArguments, choose_config, plan_run


def main(args: argparse.Namespace) -> None:
    """Parse the recipe as pretraining would, and print its plan."""
    quiet_logs()
    if args.gpus < 0 or args.memory <= 0:
        raise ValueError(f"--gpus {args.gpus} --memory {args.memory:g}: no such machine")
    path = Path(args.recipe) / "pretrain.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Name a recipe's folder, e.g. configs/tiny")
    classes, words = [PretrainArguments, TrainingArguments], ["--config", str(path)]
    recipe, training_args = stages.parse_args(classes, words, training_defaults())
    plan = plan_gpus(recipe, training_args, args) if args.gpus else plan_run(recipe, training_args)
    rate = read_throughput(args.metrics) if args.metrics else None
    print(f"{format_plan(plan)}\n{format_time(plan, args.flops_per_second, rate)}")


def plan_gpus(
    recipe: PretrainArguments, training_args: TrainingArguments, args: argparse.Namespace
) -> Plan:
    """The plan on `args.gpus` GPUs of one node, with 16 bits and a fused attention kernel."""
    sizes = find_sizes(recipe.data_dir)
    config = choose_config(recipe, sizes)
    machine = Machine(args.gpus, int(args.memory * 1e9), True, PACKED)
    return make_plan(config, sizes, training_args, recipe.optimizer, machine)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", help="a folder of configs/, such as configs/gpt2-100m")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of one node; 0: this machine")
    parser.add_argument("--memory", type=float, default=80, help="GB of memory a GPU")
    parser.add_argument(
        "--flops_per_second", type=float, help="what one process reaches, not the data sheet's peak"
    )
    parser.add_argument("--metrics", help="metrics.jsonl of a run: its tokens/s is taken")
    with stages.plain_errors():
        main(parser.parse_args())
