"""The report card of a recipe: one page that opens anywhere, and its twin in Markdown.

Reads   output/<recipe>/<stage>/{run.json, metrics.jsonl, eval.json, answers.jsonl, texts.jsonl}
Writes  output/<recipe>/report.html, output/<recipe>/report.md

    python scripts/report.py output/tiny

The words and the pictures are in report.html.jinja and report.md.jinja. The same files give the
same bytes: the date is that of the last stage, not that of the report. Every well-formed entry of
an eval.json is shown, whoever wrote it; what the numbers mean stands in comparison.py.
"""

import argparse
import html
import math
import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2

import stages
from comparison import (
    GUARDS,
    METRICS,
    SMALL,
    WORSE,
    Comparison,
    apart,
    compare_answers,
    compare_texts,
    explain,
    judge_guards,
    read_jsonl,
    show,
)

CHAT_STAGES = ("sft", "dpo", "ppo", "grpo")
POINTS = 160  # of a curve; more cannot be seen
PICKS = {"chat": 2, "fact": 1, "task": 1}  # prompts shown, in each language

HEADLINES = {
    "tokenizer": ("bytes_per_token/en", "bytes_per_token/zh", "round_trip"),
    "prepare": ("train_tokens", "validation_tokens"),
    "pretrain": ("bits_per_byte", "bits_per_byte/en", "bits_per_byte/zh"),
    "sft": ("stop_rate", "fact_accuracy", "task_accuracy", "language_match"),
    "reward": ("pair_accuracy", "pair_accuracy/wrong"),
    "dpo": ("implicit_pair_accuracy", "reward_score", "reward_score/gain"),
    "ppo": ("reward_score", "reward_score/gain", "ppo/kl", "stop_rate"),
    "grpo": (
        "task_accuracy", "task_accuracy/level_1", "task_accuracy/level_2", "task_accuracy/level_3",
        "stop_rate",
    ),
}  # fmt: skip

# Stage, title, key in metrics.jsonl (held out: "eval_" before it), horizontal axis, lowest value.
CURVES = (
    ("pretrain", "loss, nats a token", "loss", "step", None),
    ("pretrain", "loss against time", "loss", "elapsed_s", None),
    ("sft", "loss, nats an assistant token", "loss", "step", None),
    ("reward", "loss", "loss", "step", None),
    ("reward", "pair accuracy", "accuracy", "step", None),
    ("dpo", "reward margin", "rewards/margins", "step", None),
    ("dpo", "implicit accuracy", "rewards/accuracies", "step", None),
    ("ppo", "score", "ppo/score", "step", None),
    ("ppo", "KL, nats an answer", "ppo/kl", "step", None),
    ("ppo", "value loss", "ppo/value_loss", "step", None),
    ("ppo", "explained variance (drawn from -1)", "ppo/explained_variance", "step", -1.0),
    ("grpo", "reward", "reward", "step", None),
)


@dataclass
class Result:
    """What a stage left on disk; empty unless it finished."""

    name: str
    status: str  # "finished", "unfinished" or "not run"
    run: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict] = field(default_factory=dict)
    log: list[dict] = field(default_factory=list)
    answers: list[dict] = field(default_factory=list)
    texts: list[dict] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # entries of eval.json that are no metric
    stale: list[str] = field(default_factory=list)  # stages made anew after this one read them


def main(directory: Path) -> None:
    """Read a recipe's output and write both pages."""
    page = describe(directory.resolve().name, read_results(directory))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name == "report.html.jinja",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"show": show, "duration": show_duration, "plain": escape_markdown}
    environment.filters["explain"] = explain
    for name in ("report.html", "report.md"):
        text = environment.get_template(f"{name}.jinja").render(page)
        # A model can say half a character; it must not cost the report.
        (directory / name).write_text(text.strip() + "\n", encoding="utf-8", errors="replace")
        print(f"report: {directory / name}")


def read_results(directory: Path) -> dict[str, Result]:
    """What each stage left, in the order of the stages.

    Raises:
        FileNotFoundError: no stage has finished there; the message has the command.
    """
    results = {name: read_result(name, directory / name) for name in stages.STAGES}
    recipe = directory.resolve().name
    if not any(result.run for result in results.values()):
        what = "holds no finished stage" if directory.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{directory} {what}. Make it with: python scripts/pipeline.py configs/{recipe}"
        )
    for result in results.values():
        for path, hashes in result.run.get("fingerprint", {}).get("inputs", {}).items():
            source = results.get(Path(path).name)
            if source and source.run and Path(path).parent.name == recipe:
                result.stale += [source.name] * (source.run["outputs"] != hashes)
    return results


def read_result(name: str, directory: Path) -> Result:
    """One stage; of a run that was interrupted nothing is believed."""
    run = stages.read_json(directory / "run.json")
    if not run or not run.get("finished"):
        return Result(name, "unfinished" if run else "not run")
    found = stages.read_json(directory / "eval.json") or {}
    metrics = {
        key: entry | {part: finite(entry.get(part)) for part in ("value", "low", "high")}
        for key, entry in found.items()
        if isinstance(entry, dict) and "value" in entry
    }
    log, answers, texts = (
        read_jsonl(directory / f"{part}.jsonl") for part in ("metrics", "answers", "texts")
    )
    if kl := read_curve(log, "step", "ppo/kl"):
        metrics["ppo/kl"] = {"value": kl[-1][1], "unit": "nats/answer"}
    unread = sorted(found.keys() - metrics.keys())
    return Result(name, "finished", run, metrics, log, answers, texts, unread)


def finite(value: Any) -> float | int | None:
    """A number that can be shown and compared, else None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def read_curve(log: list[dict], x: str, key: str) -> list[tuple[float, float]]:
    """(x, y) of the finite values of a key: at most `POINTS`, with the first and the last."""
    points, before, offset = [], 0.0, 0.0
    for line in log:
        if line[x] < before:
            offset += before  # the clock of a resumed run starts again
        before = line[x]
        if (y := finite(line.get(key))) is not None:
            points.append((offset + before, y))
    if len(points) <= POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (POINTS - 1))] for i in range(POINTS)]


def describe(recipe: str, results: dict[str, Result]) -> dict[str, Any]:
    """Everything that stands on the page, under the names that the templates know."""
    runs = {name: result.run for name, result in results.items() if result.run}
    ended_at = max(run["started_at"] + run["wall_time_s"] for run in runs.values())
    return {
        "recipe": recipe,
        "results": results,
        "runs": runs,
        "date": datetime.fromtimestamp(ended_at, timezone.utc).strftime("%Y-%m-%d"),
        "parameters": results["pretrain"].run.get("parameters"),
        "total_s": sum(run["wall_time_s"] for run in runs.values()),
        "slowest_s": max(run["wall_time_s"] for run in runs.values()),
        "largest_bytes": max(run["peak_memory_bytes"] for run in runs.values()),
        "headlines": HEADLINES,
        "guards": judge_guards(
            {name: results[name].metrics for name in CHAT_STAGES}, compare_with_sft(results)
        ),
        "kept": {name: run["guards"] for name, run in runs.items() if run.get("guards")},
        "scores": compare_scores(results),
        "curves": [draw_curve(results[curve[0]].log, *curve) for curve in CURVES],
        "samples": pick_samples({name: results[name].answers for name in CHAT_STAGES}),
        "tables": {name: list_tables(result) for name, result in results.items()},
        "pictures": {name: draw_histograms(result) for name, result in results.items()},
        "origins": compare_origins(runs),
        "glossary": METRICS,
        "arrows": {1: " ↑", -1: " ↓", 0: ""},
        "limits": {"worse": WORSE, "small": SMALL},
    }


def compare_with_sft(results: dict[str, Result]) -> dict[str, dict[str, Comparison]]:
    """Chat stage -> guard -> its paired difference to SFT, where both left the same rows."""
    base, found = results["sft"], {}
    levels = {name for row in base.answers for name in row.get("scores", {}) if "/level_" in name}
    for name in CHAT_STAGES[1:]:
        other = results[name]
        pairs = compare_answers(base.answers, other.answers, {*GUARDS, *levels})
        pairs += compare_texts(base.texts, other.texts)
        found[name] = {pair.metric: pair for pair in pairs}
    return found


def compare_scores(results: dict[str, Result]) -> dict[str, Any] | None:
    """Reward-model scores of the chat stages with the ticks of their axis; None without any."""
    scores = {name: results[name].metrics.get("reward_score", {}) for name in CHAT_STAGES}
    # SFT ends before there is a reward model: the stages that start from it have it scored.
    references = (result.metrics.get("reward_score/reference") for result in results.values())
    scores["sft"] = next(filter(None, references), {})
    scores = {name: score for name, score in scores.items() if score.get("value") is not None}
    if not scores:
        return None
    values = [score[part] for score in scores.values() for part in ("low", "value", "high")]
    known = [value for value in values if value is not None]
    rows = []
    for name, score in scores.items():
        gain = results[name].metrics.get("reward_score/gain", {})
        # Paired where it can be: what makes a prompt hard for both then cancels.
        pair = (gain, {"low": 0, "high": 0}) if gain else (scores.get("sft", {}), score)
        rows.append((name, score, gain, apart(*pair)))
    return {"rows": rows, "ticks": ticks(min(known), max(known)), "compared": "sft" in scores}


def draw_curve(
    log: list[dict], stage: str, title: str, key: str, x: str, lowest: float | None
) -> dict[str, Any]:
    """One picture: `lines` (none where nothing was logged), `x_ticks` and `y_ticks`."""
    pairs = (("training", key), ("held out", f"eval_{key}"))
    lines = {label: points for label, name in pairs if (points := read_curve(log, x, name))}
    curve = {"stage": stage, "title": title, "x": x, "lowest": lowest, "lines": lines}
    if lines:
        xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
        ys = [y if lowest is None else max(y, lowest) for y in ys]
        curve |= {"x_ticks": ticks(0, max(xs)), "y_ticks": ticks(min(ys), max(ys))}
    return curve


def ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers, from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= span / 4)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [float(f"{i * step:.6g}") for i in range(first, last + 1)]


def pick_samples(answers: dict[str, list[dict]]) -> dict[str, Any]:
    """The chat stages that answered, and the same few prompts with the answer of each.

    The prompts are the first of their kind in the file, the kinds in turn: nobody chose them. What
    SFT's rows have of the model before it comes first, as "before sft".
    """
    answers = {name: rows for name, rows in answers.items() if rows}
    asked = next(iter(answers.values()), [])
    before = [
        {"prompt": row["prompt"], "answer": row["previous"], "finished": True}
        for row in answers.get("sft", [])
        if "previous" in row
    ]
    answers = ({"before sft": before} if before else {}) | answers
    by_prompt = {n: {str(row["prompt"]): row for row in rows} for n, rows in answers.items()}
    picked = []
    for source, count in PICKS.items():
        kinds: dict[str, dict[str, dict]] = {}
        for row in asked:
            if row["source"] == source:
                kinds.setdefault(row["lang"], {}).setdefault(str(row.get("kind")), row)
        for turn, (_, firsts) in enumerate(sorted(kinds.items())):
            ordered = [row for _, row in sorted(firsts.items())]
            for i in range(min(count, len(ordered))):
                picked.append(ordered[(turn * count + i) % len(ordered)])
    rows = [(row, [at.get(str(row["prompt"])) for at in by_prompt.values()]) for row in picked]
    return {"stages": list(answers), "rows": rows}


def list_tables(result: Result) -> list[tuple[str, list[str], list[list[Any]]]]:
    """(title, columns, rows) of the lists of rows that metrics carry, and of a confusion matrix."""
    tables = []
    for name, metric in result.metrics.items():
        for key, rows in metric.items():
            if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
                tables.append((f"{name}: {key}", list(rows[0]), [list(r.values()) for r in rows]))
    if matrix := result.run.get("confusion_matrix"):
        labels = matrix["labels"]
        rows = [[label, *row] for label, row in zip(labels, matrix["rows"], strict=True)]
        tables.append(("confusion matrix: right label, then what was said", ["", *labels], rows))
    return tables


def draw_histograms(result: Result) -> list[dict[str, Any]]:
    """`title`, `bars` of (from, to, count) and the ticks of each metric's `histogram`."""
    found = [(n, m["histogram"]) for n, m in result.metrics.items() if "histogram" in m]
    pictures = []
    for name, histogram in found:
        edges, counts = histogram["edges"], histogram["counts"]
        pictures.append({
            "title": name, "bars": list(zip(edges, edges[1:], counts, strict=False)),
            "x_ticks": ticks(edges[0], edges[-1]), "y_ticks": ticks(0, max(counts)),
        })  # fmt: skip
    return pictures


def compare_origins(runs: dict[str, dict]) -> dict[str, str]:
    """Commit, hardware and versions; with the stages' names where they differ."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, run in runs.items():
        commit = {"git commit": str(run["git_commit"] or "unknown")[:12]}
        for key, value in (commit | run["hardware"] | run["versions"]).items():
            found.setdefault(key, {}).setdefault(str(value), []).append(name)
    return {
        key: "; ".join(
            value if len(values) == 1 else f"{value} ({', '.join(names)})"
            for value, names in values.items()
        )
        for key, values in found.items()
    }


def show_duration(seconds: float) -> str:
    """`42 s` or `3 min 05 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.0f} s"


def escape_markdown(text: Any) -> str:
    """Text that stays text in a Markdown table: no tag, no markup, one line."""
    text = re.sub(r"([\\`*_\[\]|~$!#])", r"\\\1", html.escape(str(text), quote=False))
    return "<br>".join(line.strip() for line in text.splitlines() if line.strip())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="output/<recipe>")
    with stages.plain_errors():
        main(parser.parse_args().directory)
