"""Measure a directory with lm-evaluation-harness: numbers that others can compare with theirs.

    python scripts/harness.py output/tiny/pretrain --files blimp.jsonl arc_easy.jsonl
    python scripts/harness.py output/tiny/grpo --tasks arc_easy hellaswag --apply_chat_template

--tasks are the harness's own (they need the network, or its cache). --files are tasks in JSON lines
that are there, of two layouts:

    {"sentence_good": "...", "sentence_bad": "..."}     minimal pairs, as BLiMP has them
    {"query": "...", "choices": ["...", ...], "gold": 0}     multiple choice, as ARC

Writes harness/<task>/<metric> into the directory's eval.json, which the report card shows.
Needs the lm-eval package: pip install -r requirements-extras.txt
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import stages

MEAN = {"aggregation": "mean", "higher_is_better": True}  # the harness warns of what is not said
LAYOUTS = {
    ("sentence_good", "sentence_bad"): {
        "doc_to_text": "",
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"} | MEAN],
    },
    ("query", "choices", "gold"): {
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"} | MEAN, {"metric": "acc_norm"} | MEAN],
    },
}


def main(args: argparse.Namespace) -> None:
    """Run the tasks, print and keep their numbers."""
    stages.require_input(args.directory, "config.json", "tokenizer.json")
    tasks = [describe_task(Path(path)) for path in args.files] + args.tasks
    if not tasks:
        raise ValueError("name --tasks of the harness or --files of your own")
    results = run_harness(args, tasks)
    metrics = read_results(results)
    from pretrain.eval import print_metrics, save_metrics

    print_metrics(metrics)
    if Path(args.directory).is_dir():
        save_metrics(args.directory, metrics)
        print(f"-> {args.directory}/eval.json")
    else:
        print(f"{args.directory} is a name on the Hub: nothing is written")


def describe_task(path: Path) -> dict[str, Any]:
    """The harness's task for a file, by the fields of its first row.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the first row is no JSON object or has neither layout.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    known = " or ".join(", ".join(fields) for fields in LAYOUTS)
    with path.open(encoding="utf-8") as file:
        line = file.readline()
    try:
        row = dict(json.loads(line))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}:1: {line[:40]!r} is no JSON object; a task's file has one a line, with {known}"
        ) from error
    layout = next((LAYOUTS[fields] for fields in LAYOUTS if set(fields) <= set(row)), None)
    if layout is None:
        raise ValueError(f"{path}:1: the row has {list(row)}; a task needs {known}")
    files = {"test": str(path.resolve())}
    return layout | {
        "task": path.stem, "output_type": "multiple_choice", "test_split": "test",
        "dataset_path": "json", "dataset_kwargs": {"data_files": files},
    }  # fmt: skip


def run_harness(args: argparse.Namespace, tasks: list[Any]) -> dict[str, Any]:
    """The results of `lm_eval.simple_evaluate`.

    Raises:
        ValueError: the harness has no task of a name.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        sys.exit("lm-eval is not installed: pip install -r requirements-extras.txt")
    import torch
    from transformers import logging

    logging.set_verbosity_error()
    manager = TaskManager()
    for name in args.tasks:
        if not manager.match_tasks([name]):
            raise ValueError(f"--tasks {name}: no such task; `lm-eval ls tasks` lists them")
    return lm_eval.simple_evaluate(
        model="hf",
        model_args=choose_model_args(args.directory, args.apply_chat_template),
        tasks=tasks,
        task_manager=manager,
        batch_size=args.batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        apply_chat_template=args.apply_chat_template,
        log_samples=False,
    )


def choose_model_args(directory: str, apply_chat_template: bool) -> dict[str, Any]:
    """What the harness is told of the model.

    Our models have read every text behind <bos>, and no conversation: the chat template has none.
    Somebody else's are encoded as the harness does by itself, or nobody could compare the numbers.
    """
    from transformers import AutoTokenizer

    given = {"pretrained": directory, "dtype": "float32"}
    if Path(directory, "run.json").is_file() and not apply_chat_template:
        given["add_bos_token"] = AutoTokenizer.from_pretrained(directory).bos_token_id is not None
    return given


def read_results(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{"harness/<task>/<metric>": an entry of eval.json}, the interval from the standard error."""
    from pretrain.eval import Z, make_metric

    metrics = {}
    for task, found in results["results"].items():
        counts = results.get("n-samples", {}).get(task, {})
        for key, value in found.items():
            name, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or name.endswith("_stderr") or not filtered:
                continue
            error = found.get(f"{name}_stderr,{filtered}")
            margin = Z * error if isinstance(error, int | float) else math.nan
            unit = "share" if 0 <= value <= 1 and name.startswith(("acc", "exact_match")) else name
            name += "" if filtered == "none" else f"/{filtered}"
            n = counts.get("effective")
            metrics[f"harness/{task}/{name}"] = make_metric(
                value, value - margin, value + margin, n, unit
            )
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", help="a stage's output, or a name on the Hub")
    parser.add_argument("--files", nargs="+", default=[], help="tasks in JSON lines files")
    parser.add_argument("--tasks", nargs="+", default=[], help="names of the harness's tasks")
    parser.add_argument("--limit", type=int, help="rows a task, the first ones")
    parser.add_argument("--num_fewshot", type=int, help="examples before each question")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--apply_chat_template", action="store_true", help="ask a chat model in its own format"
    )
    with stages.plain_errors():
        main(parser.parse_args())
