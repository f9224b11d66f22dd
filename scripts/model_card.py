"""The model card of a trained directory, from what its stages wrote: run.json, eval.json, answers.

Nothing is measured here and nothing is invented: what a record does not say, the card does not say.
The words are in model_card.md.jinja.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import report

import provenance
import stages


def write_card(directory: Path, name: str, gguf: Sequence[str] = ()) -> str:
    """The card as Markdown with the metadata block that the Hub reads.

    Args:
        directory: a model's directory.
        name: how the card calls it: a repository on the Hub or a directory.
        gguf: names of GGUF files that stand beside the card.
    """
    run = stages.read_json(directory / "run.json") or {}
    evaluation = stages.read_json(directory / "eval.json") or {}
    config = stages.read_json(directory / "config.json") or {}
    answers = report.read_jsonl(directory / "answers.jsonl")
    steps = trace(directory)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"show": report.show, "plain": report.escape_markdown}
    environment.filters["duration"] = report.show_duration
    text = environment.get_template("model_card.md.jinja").render(
        metadata=make_metadata(name, run, evaluation, answers, is_classifier(config)),
        name=name,
        stage=run.get("stage"),
        gguf=gguf,
        config=config,
        is_classifier=is_classifier(config),
        is_chat=(directory / "chat_template.jinja").is_file() and run.get("stage") != "pretrain",
        steps=steps,
        data=collect_data(steps),
        evaluation={key: metric for key, metric in evaluation.items() if "/" not in key},
        glossary=report.METRICS,
        samples=pick(answers),
        continuations=run.get("samples", []),
        versions=run.get("versions", {}),
        hardware=run.get("hardware", {}),
    )
    return text.strip() + "\n"


def is_classifier(config: dict) -> bool:
    """Whether a config.json is of a model that scores texts (a reward model, a classifier)."""
    return any("ForSequenceClass" in name for name in config.get("architectures") or [])


def make_metadata(
    name: str, run: dict, evaluation: dict, answers: list[dict], scores: bool = False
) -> str:
    """The YAML block: library, languages, tags and the measured numbers.

    `scores` says that the model scores texts and writes none.
    """
    from huggingface_hub import EvalResult, ModelCardData

    task = "text-classification" if scores else "text-generation"
    results = [
        EvalResult(
            task_type=task, dataset_type="held-out", dataset_name="held-out rows",
            metric_type=key, metric_name=key, metric_value=metric["value"],
        )
        for key, metric in sorted(evaluation.items())
        if report.finite(metric.get("value")) is not None
    ]  # fmt: skip
    languages = {row["lang"] for row in answers} & {"en", "zh"}
    return ModelCardData(
        language=sorted(languages) or None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["ladderlm", *([run["stage"]] if "stage" in run else [])],
        model_name=name,
        eval_results=results or None,
    ).to_yaml()


def trace(directory: Path) -> list[dict[str, Any]]:
    """The runs that led to this directory, the first stage first.

    Each is a run.json with `weights` (sha256 of its model or data) and `changed` (whether an input
    is no longer the file that the run read).
    """
    steps: dict[str, dict] = {}
    _trace(directory, steps)
    order = [*stages.STAGES, *stages.BRANCHES]
    return sorted(steps.values(), key=lambda run: order.index(run["stage"]))


def _trace(directory: Path, steps: dict[str, dict]) -> None:
    run = stages.read_json(directory / "run.json")
    if run is None and (directory / "adapter_config.json").is_file():  # a part of its stage
        run = stages.read_json(directory.parent / "run.json")
    if run is None or run["stage"] in steps:
        return
    outputs = run.get("outputs", {})
    weights = next((outputs[n] for n in outputs if n.endswith((".safetensors", ".parquet"))), None)
    steps[run["stage"]] = run | {"weights": weights or outputs.get("tokenizer.json"), "changed": []}
    for path, hashes in run["fingerprint"]["inputs"].items():
        source = Path(path)
        if not source.is_dir():  # moved with its recipe
            source = directory.parent / source.name
        if source == directory:
            continue  # an adapter that is gone had the name of its merged model
        if source.is_dir() and provenance.hash_outputs(source) != hashes:
            steps[run["stage"]]["changed"].append(source.name)
        _trace(source, steps)


def collect_data(steps: list[dict]) -> dict[str, tuple[str | None, list[str]]]:
    """Data file -> (sha256, the stages that read it)."""
    found: dict[str, tuple[str | None, list[str]]] = {}
    for run in steps:
        for path, digest in run["fingerprint"]["data"].items():
            found.setdefault(path, (digest, []))[1].append(run["stage"])
    return found


def pick(answers: list[dict]) -> list[dict]:
    """A few answers: the first of each kind of prompt, so that nobody chose them."""
    return [found[0] for _, found in report.pick_samples({"this": answers})["rows"]]
