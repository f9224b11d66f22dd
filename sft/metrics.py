"""What the labels that were said are worth, beside those that are right."""

import numpy as np

from pretrain.eval import share_with_interval

RESAMPLES = 1000


def measure_labels(right: list[str], said: list[str], labels: list[str]) -> dict[str, dict]:
    """Accuracy, F1 of each label and their mean, and the confusion matrix.

    Returns:
        {metric: {"value", "low", "high", "n", "unit"}}; the matrix has "labels" and "rows" instead
        of a value: one row a right label, one column a said one.
    """
    pairs = list(zip(right, said, strict=True))
    metrics = {"accuracy": share_with_interval(a == b for a, b in pairs)}
    metrics["f1"] = f1_with_interval(right, said, labels)
    metrics |= {f"f1/{label}": f1_with_interval(right, said, [label]) for label in labels}
    table = [[pairs.count((a, b)) for b in labels] for a in labels]
    return metrics | {
        "confusion_matrix": {"labels": labels, "rows": table, "n": len(pairs), "unit": "texts"}
    }


def f1_with_interval(right: list[str], said: list[str], labels: list[str]) -> dict:
    """The mean over `labels` of F1 and its 95 % interval by the bootstrap (Efron 1979)."""
    drawn = np.random.default_rng(0).integers(0, len(right), (RESAMPLES, len(right)))
    as_it_is = np.arange(len(right))[None]
    resampled = mean_f1(np.array(right), np.array(said), labels, drawn)
    low, high = np.quantile(resampled, [0.025, 0.975])
    value = mean_f1(np.array(right), np.array(said), labels, as_it_is)[0]
    found = {"value": value, "low": low, "high": high}
    return {k: round(float(v), 6) for k, v in found.items()} | {"n": len(right), "unit": "F1"}


def mean_f1(
    right: np.ndarray, said: np.ndarray, labels: list[str], drawn: np.ndarray
) -> np.ndarray:
    """The mean F1 of each sample: `drawn` has the positions of its rows, (samples, rows).

    F1 is the harmonic mean of precision and recall, 0 where a label is neither there nor said.
    """
    scores = []
    for label in labels:
        is_right, is_said = (right == label)[drawn], (said == label)[drawn]
        hits, named = (is_right & is_said).sum(1), is_right.sum(1) + is_said.sum(1)
        scores.append(2 * hits / np.maximum(named, 1))
    return np.mean(scores, axis=0)
