"""How far a reward model can be trusted: on held-out pairs, with intervals and a picture.

pair_accuracy        share of the pairs in the right order; chance is 0.5
loss                 -log sigmoid(margin), nats a pair; chance is log 2 = 0.693
calibration_error    mean distance between the confidence sigmoid(|margin|) and the share that is
                     right at that confidence (expected calibration error, Guo et al. 2017)
length_correlation   of an answer's score with its tokens, over all answers: how far length pays
margin_length_correlation   of a pair's margin with its difference in tokens
longer_chosen        share of the pairs whose longer answer is the chosen one: what length alone
                     would get, and so what the two numbers before it must be read against
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.eval import Z, mean_with_interval, share_with_interval

CONFIDENCE_BINS = 10  # from 0.5 to 1
HISTOGRAM_BINS = 20
RESAMPLES = 1000


def measure_pairs(
    chosen: Sequence[float],
    rejected: Sequence[float],
    lengths: Sequence[tuple[int, int]],
    flaws: Sequence[str | None],
) -> dict[str, dict[str, Any]]:
    """All numbers above, as they stand in eval.json.

    Args:
        chosen: scores of the chosen answers, `rejected` those of the others.
        lengths: tokens of the (chosen, rejected) answer of each pair.
        flaws: what is wrong with the rejected answer, where the pairs say it; the accuracy is
            given by flaw, too.
    """
    margins = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
    longer = [a - b for a, b in lengths]
    metrics = {
        "pair_accuracy": share_with_interval(margin > 0 for margin in margins),
        "margin": mean_with_interval(margins, "reward-model score") | make_histogram(margins),
        "loss": mean_with_interval([-log_sigmoid(margin) for margin in margins], "nats/pair"),
        "calibration_error": calibrate(margins),
        "length_correlation": correlate(
            [*chosen, *rejected], [a for a, _ in lengths] + [b for _, b in lengths]
        ),
        "margin_length_correlation": correlate(margins, longer),
        "longer_chosen": share_with_interval(length > 0 for length in longer if length),
    }
    by_flaw = defaultdict(list)
    for flaw, margin in zip(flaws, margins, strict=True):
        if flaw:
            by_flaw[f"pair_accuracy/{flaw}"].append(margin > 0)
    return metrics | {name: share_with_interval(hits) for name, hits in sorted(by_flaw.items())}


def log_sigmoid(x: float) -> float:
    """log(1 / (1 + exp(-x))), without overflow."""
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def make_histogram(values: Sequence[float]) -> dict[str, Any]:
    """{"histogram": {"edges", "counts"}} of values; one more edge than counts."""
    counts, edges = np.histogram(values, bins=HISTOGRAM_BINS)
    return {"histogram": {"edges": edges.round(4).tolist(), "counts": counts.tolist()}}


def calibrate(margins: Sequence[float]) -> dict[str, Any]:
    """The expected calibration error of sigmoid(|margin|), its 95 % interval, and the bins.

    The interval is that of `RESAMPLES` bootstrap samples. The error is never negative, so that a
    perfect model with few pairs lies above zero, too.
    """
    confidence = 1 / (1 + np.exp(-np.abs(np.asarray(margins, dtype=float))))
    right = np.asarray(margins) > 0
    bins = np.minimum(((confidence - 0.5) * 2 * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    generator, n = np.random.default_rng(0), len(margins)
    samples = generator.integers(0, n, (RESAMPLES, n))
    errors = [_calibration_error(confidence[s], right[s], bins[s]) for s in samples]
    low, high = np.quantile(errors, [0.025, 0.975])
    rows = [
        {
            "from": round(0.5 + b / (2 * CONFIDENCE_BINS), 3),
            "n": int((bins == b).sum()),
            "confidence": round(float(confidence[bins == b].mean()), 6),
            "accuracy": round(float(right[bins == b].mean()), 6),
        }
        for b in range(CONFIDENCE_BINS)
        if (bins == b).any()
    ]
    return {
        "value": round(_calibration_error(confidence, right, bins), 6),
        "low": round(float(low), 6), "high": round(float(high), 6),
        "n": n, "unit": "share", "bins": rows,
    }  # fmt: skip


def _calibration_error(confidence: np.ndarray, right: np.ndarray, bins: np.ndarray) -> float:
    gaps = np.bincount(bins, weights=right - confidence, minlength=CONFIDENCE_BINS)
    return float(np.abs(gaps).sum() / len(bins))


def correlate(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """Pearson's correlation and its 95 % interval (Fisher's z); None where a side is constant."""
    n, unit = len(x), "correlation"
    if n < 4 or np.std(x) == 0 or np.std(y) == 0:
        return {"value": None, "low": None, "high": None, "n": n, "unit": unit}
    r = float(np.corrcoef(x, y)[0, 1])
    z, margin = math.atanh(max(min(r, 1 - 1e-12), 1e-12 - 1)), Z / math.sqrt(n - 3)
    low, high = math.tanh(z - margin), math.tanh(z + margin)
    return {
        "value": round(r, 6), "low": round(low, 6), "high": round(high, 6), "n": n, "unit": unit
    }  # fmt: skip


def draw_pairs(
    directory: str | Path,
    metrics: dict[str, dict],
    scores: Sequence[float],
    lengths: Sequence[int],
) -> Path:
    """margins.png: the histogram of margins, the calibration, and scores against lengths."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    histogram = metrics["margin"]["histogram"]
    left.stairs(histogram["counts"], histogram["edges"], fill=True, color="tab:blue", alpha=0.7)
    left.axvline(0, color="black", linewidth=1)
    accuracy = metrics["pair_accuracy"]
    left.set(xlabel="margin, chosen - rejected", ylabel="held-out pairs")
    interval = f"[{accuracy['low']:.1%}, {accuracy['high']:.1%}]"
    left.set_title(f"{accuracy['value']:.1%} in the right order {interval}")
    error = metrics["calibration_error"]
    middle.plot([0.5, 1], [0.5, 1], color="black", linewidth=1, label="calibrated")
    middle.scatter(
        [row["confidence"] for row in error["bins"]], [row["accuracy"] for row in error["bins"]],
        s=[10 + 400 * row["n"] / error["n"] for row in error["bins"]], label="pairs of a bin",
    )  # fmt: skip
    middle.set(xlabel="confidence, sigmoid(|margin|)", ylabel="share in the right order")
    middle.set(xlim=(0.48, 1.02), ylim=(-0.02, 1.02))
    middle.set_title(f"expected calibration error {error['value']:.3f}")
    middle.legend()
    right.scatter(lengths, scores, s=6, alpha=0.5)
    right.set(xlabel="tokens of the answer", ylabel="score")
    correlation = metrics["length_correlation"]["value"]
    right.set_title(f"correlation {correlation:+.2f}" if correlation is not None else "no spread")
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    path = Path(directory) / "margins.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path
