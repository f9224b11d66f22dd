"""What the numbers mean, and whether two runs differ on the same held-out rows.

The report card and `scripts/compare.py` both ask here. Plain Python, no imports to wait for.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESAMPLES = 1000
SMALL = 0.02  # a share below counts as this much: 0.001 -> 0.003 is noise, not three times worse
WORSE = 0.05  # relative to SFT
LONGER = 0.5

# Direction (1: more is better, -1: less is, 0: neither) and meaning. The order is the report's.
METRICS = {
    "bits_per_byte": (-1, "bits the model needs for each UTF-8 byte of unseen plain text"),
    "stop_rate": (1, "answers that end by themselves"),
    "repetition": (-1, "token triples that the same answer has said before"),
    "length": (0, "tokens in an answer"),
    "language_match": (1, "answers in the language of the question"),
    "fact_accuracy": (1, "held-out factual questions answered right"),
    "task_accuracy": (1, "held-out tasks solved, as a program checks; level 1 is the easiest"),
    "pass@": (1, "the chance that one of so many sampled answers solves a task"),
    "perplexity": (-1, "exp of the loss a token: compares models of one tokenizer only"),
    "bleu": (1, "BLEU of the answers against their references, by sacrebleu, of 100"),
    "chrf": (1, "chrF, the same on characters, of 100"),
    "rouge": (1, "ROUGE F1 of the answers against their references; Chinese by character"),
    "judge_score": (1, "a language model's mark for the answers beside the reference, of 100"),
    "judge_win_rate": (1, "answers that the judge prefers in both orders, ties as half"),
    "harness": (1, "tasks of lm-evaluation-harness"),
    "bytes_per_token": (1, "UTF-8 bytes in a token: more means shorter sequences"),
    "round_trip": (1, "documents that decode to exactly their text"),
    "train_tokens": (0, "tokens of the pretraining text; validation_tokens are held out"),
    "pair_accuracy": (1, "held-out pairs where the reward model prefers the chosen answer"),
    "implicit_pair_accuracy": (1, "held-out pairs where DPO raised the chosen answer more"),
    "reward_score": (1, "the reward model's mean score of the answers; only differences mean much"),
    "reward_score/gain": (1, "that score minus SFT's on the same prompts, paired"),
    "ppo/kl": (0, "nats that an answer lies from the reference, at the last log: the price paid"),
    "margin": (1, "implicit reward of the chosen answer minus the rejected one's"),
    "explained variance": (1, "share of the returns' variance that PPO's critic foresees"),
}
GUARDS = tuple(METRICS)[:7]
UNITS = {"length": "tokens", "bits_per_byte": "bits/byte"}  # all else that rows have is a share


def explain(metric: str) -> tuple[int, str]:
    """Direction and meaning of a metric; of its part, such as "bits_per_byte/zh", the whole's."""
    names = [name for name in METRICS if re.match(re.escape(name) + "(?![a-z_])", metric)]
    return METRICS[max(names, key=len)] if names else (0, "")


class Comparison(NamedTuple):
    """One metric of two runs on the rows that both have; `low` to `high` encloses b - a."""

    metric: str
    unit: str
    n: int
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    p: float | None

    @property
    def is_apart(self) -> bool:
        """Whether 0 lies outside of the interval."""
        return self.low is not None and not self.low <= 0 <= self.high

    @property
    def verdict(self) -> str:
        """What happened from a to b: "better", "worse", "changed", or "no difference seen"."""
        if not self.is_apart:
            return "no difference seen"
        sign = explain(self.metric)[0] * self.difference
        return "better" if sign > 0 else "worse" if sign < 0 else "changed"


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0
) -> tuple[float, float | None, float | None, float | None]:
    """The difference of two means over the same rows, its 95 % interval and two-sided p-value.

    The rows are drawn anew with replacement, both runs' values of a row together (Efron 1979;
    Koehn 2004): what makes a row hard for both then cancels.

    Args:
        a, b: a value a row, in the same order of rows.
        weights: what the sums are divided by, a number a row (bits and bytes); None means means.

    Returns:
        (mean b - mean a, low, high, p); no interval for fewer than two rows.
    """
    differences = [y - x for x, y in zip(a, b, strict=True)]
    n, generator = len(differences), random.Random(seed)

    def draw_mean(_: int) -> float:
        if weights is None:
            return sum(generator.choices(differences, k=n)) / n
        tops, bottoms = zip(*generator.choices(pairs, k=n), strict=True)
        return sum(tops) / sum(bottoms)

    pairs = [] if weights is None else list(zip(differences, weights, strict=True))
    difference = sum(differences) / (n if weights is None else sum(weights))
    if n < 2:
        return difference, None, None, None
    drawn = sorted(map(draw_mean, range(RESAMPLES)))
    below, above = sum(value <= 0 for value in drawn), sum(value >= 0 for value in drawn)
    p = min(1.0, 2 * (min(below, above) + 1) / (RESAMPLES + 1))
    edge = RESAMPLES // 40  # 2.5 % on each side
    return difference, drawn[edge], drawn[-edge - 1], p


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a file, none where there is no file."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    # Not splitlines(): a string of JSON may hold U+2028, which ends no line here.
    return [json.loads(line) for line in text.split("\n") if line]


def pair_rows(a: Iterable[dict], b: Iterable[dict], *keys: str) -> list[tuple[dict, dict]]:
    """The rows that two runs have in common: equal in `keys`; the n-th of equals with the n-th."""

    def number(rows: Iterable[dict]) -> dict[tuple, dict]:
        seen, found = {}, {}
        for row in rows:
            name = json.dumps([row.get(key) for key in keys], ensure_ascii=False)
            seen[name] = seen.get(name, 0) + 1
            found[name, seen[name]] = row
        return found

    first, second = number(a), number(b)
    return [(row, second[name]) for name, row in first.items() if name in second]


def compare_answers(
    a: Iterable[dict], b: Iterable[dict], metrics: Collection[str] | None = None
) -> list[Comparison]:
    """Every metric that the rows of two answers.jsonl have (or these), on the rows both have."""
    pairs = pair_rows(a, b, "source", "prompt", "reference")
    values: dict[str, list[tuple[float, float]]] = {}
    for one, other in pairs:
        theirs = other.get("scores", {})
        for name, value in one.get("scores", {}).items():
            if name in theirs and (metrics is None or name in metrics):
                values.setdefault(name, []).append((float(value), float(theirs[name])))
    return [
        make_comparison(name, *zip(*found, strict=True)) for name, found in sorted(values.items())
    ]


def compare_texts(a: Iterable[dict], b: Iterable[dict]) -> list[Comparison]:
    """Bits per byte of the documents that the rows of two texts.jsonl have in common.

    Long documents are compared piece by piece, so that one of them is enough for an interval.
    """
    bits, sizes = ([], []), []
    for rows in pair_rows(a, b, "sha256"):
        pieces = [row.get("pieces") or [[row["nats"], row["bytes"]]] for row in rows]
        for found, theirs in zip(bits, pieces, strict=True):
            found += [nats / math.log(2) for nats, _ in theirs]
        sizes += [size for _, size in pieces[0]]
    return [make_comparison("bits_per_byte", *bits, sizes)] if sizes else []


def make_comparison(
    name: str, a: Sequence[float], b: Sequence[float], weights: Sequence[float] | None = None
) -> Comparison:
    """One metric's values of two runs, paired, as a `Comparison`."""
    total = len(a) if weights is None else sum(weights)
    unit = UNITS.get(name.split("/")[0], "share")
    return Comparison(
        name, unit, len(a), sum(a) / total, sum(b) / total, *paired_bootstrap(a, b, weights)
    )


def compare_directories(a: Path, b: Path) -> list[Comparison]:
    """What two stages' answers.jsonl and texts.jsonl have in common.

    Raises:
        ValueError: they share no row that was measured.
    """
    texts = compare_texts(*(read_jsonl(path / "texts.jsonl") for path in (a, b)))
    found = texts + compare_answers(*(read_jsonl(path / "answers.jsonl") for path in (a, b)))
    if not found:
        raise ValueError(
            f"{a} and {b} have no measured row in common. Measure both on the same data: "
            f"python -m sft.eval {a} {b} --config configs/tiny/eval.yaml"
        )
    return found


def judge_guards(
    metrics: dict[str, dict[str, dict]], pairs: dict[str, dict[str, Comparison]]
) -> dict[str, Any]:
    """The guards of every chat stage beside SFT's.

    Args:
        metrics: chat stage -> its metrics; none where it was not measured.
        pairs: chat stage -> guard -> the paired difference to SFT, where there is one.

    Returns:
        `stages` that were measured, `rows` (guard, direction, cells of (metric, mark, difference)),
        `alarms` and `missing` (sentences), `compared` (whether there is an SFT to compare with).
    """
    base = metrics["sft"]
    metrics = {name: found for name, found in metrics.items() if found}
    rows, alarms, missing = [], [], []
    levels = sorted({key for found in metrics.values() for key in found if "/level_" in key})
    for guard in [*GUARDS, *levels]:
        direction, cells = explain(guard)[0], []
        for name, found in metrics.items():
            metric = found.get(guard, {})
            mark, change = judge(base.get(guard, {}), metric, direction)
            pair = pairs.get(name, {}).get(guard)
            beside = pair and f"paired {show_difference(pair)}"
            cells.append((metric, mark and f"{mark} {100 * change:+.1f} %", beside))
            if mark == "worse":
                doubt = "" if apart(base[guard], metric) else "; the intervals overlap"
                if pair:
                    doubt = f"; {beside}" + ("" if pair.is_apart else ", perhaps noise")
                alarms.append(f"{name}, {guard}: {show(base[guard])} → {show(metric)}{doubt}")
            elif metric.get("value") is None:
                missing.append(f"{name} {guard}")
        rows.append((guard, direction, cells))
    return {"stages": list(metrics), "rows": rows, "alarms": alarms, "missing": missing,
            "compared": bool(base)}  # fmt: skip


def judge(base: dict, metric: dict, direction: int) -> tuple[str, float]:
    """("worse", "changed" or "", change relative to SFT's value)."""
    before, after = base.get("value"), metric.get("value")
    if before is None or after is None:
        return "", 0.0
    if metric["unit"] == "share":
        before, after = max(before, SMALL), max(after, SMALL)
    change = after / before - 1 if before else 0.0
    if direction == 0:
        return ("changed" if abs(change) > LONGER else ""), change
    # 0.95 of a value is not more than 5 % below it, whatever the last bit says.
    return ("worse" if -direction * change > WORSE + 1e-9 else ""), change


def apart(one: dict, other: dict) -> bool:
    """Whether two intervals have no value in common; an unknown one is apart from none."""
    bounds = [metric.get(end) for metric in (one, other) for end in ("low", "high")]
    return None not in bounds and (bounds[1] < bounds[2] or bounds[3] < bounds[0])


def show(metric: dict[str, Any], with_n: bool = False) -> str:
    """`98.2 % [96.8, 99.0], n 240`; a dash for what was not measured or is not a number."""
    if metric.get("value") is None:
        return "—"
    percent = metric.get("unit") == "share"
    value, low, high = (
        None if number is None else show_number(number * 100 if percent else number, percent)
        for number in (metric.get(part) for part in ("value", "low", "high"))
    )
    text = f"{value} %" if percent else value
    if low is not None and high is not None:
        text += f" [{low}, {high}]"
    return text + (f", n {metric['n']:,}" if with_n and metric.get("n") else "")


def show_number(number: float, percent: bool) -> str:
    """One decimal of a per cent or a large number, three of others; whole numbers as they are."""
    if isinstance(number, int) and not percent:
        return f"{number:,}"
    digits = 1 if percent or abs(number) >= 10 else 3
    return f"{round(number, digits) + 0.0:.{digits}f}"  # + 0.0 turns -0.0 into 0.0


def show_difference(found: Comparison) -> str:
    """`-3.1 [-5.0, -1.2]`, in points of a per cent for a share."""
    percent = found.unit == "share"
    value, low, high = (
        None if number is None else show_number(number * (100 if percent else 1), percent)
        for number in (found.difference, found.low, found.high)
    )
    sign = "+" if found.difference > 0 else ""
    return f"{sign}{value}" + (f" [{low}, {high}]" if low is not None else "")
