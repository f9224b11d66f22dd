"""Whether two runs differ, on the held-out rows that both have answered or read.

    python scripts/compare.py output/tiny/sft output/tiny/dpo
    python scripts/compare.py output/tiny output/mine

Reads   RUN/answers.jsonl and RUN/texts.jsonl, as `sft.eval` and pretraining leave them; of two
        recipes' folders every stage that both have
Writes  RUN_B/compare_<RUN_A>.json and .png, and the table

The differences are RUN_B - RUN_A with 95 % intervals of a paired bootstrap. With twenty metrics,
one is expected to look different by chance.
"""

import argparse
import json
from pathlib import Path

import comparison
import stages

COLOURS = {"better": "tab:green", "worse": "tab:red", "changed": "tab:orange"}


def main(a: Path, b: Path) -> None:
    """Compare two directories, or the stages of two recipes."""
    for path in (a, b):
        if not path.is_dir():
            raise FileNotFoundError(f"{path} does not exist. Name a stage's output directory")
    if any((a / name).is_file() for name in ("answers.jsonl", "texts.jsonl")):
        pairs = [(a, b)]
    else:
        pairs = [(a / s, b / s) for s in stages.STAGES if (a / s).is_dir() and (b / s).is_dir()]
    compared = 0
    for one, other in pairs:
        try:
            found = comparison.compare_directories(one, other)
        except ValueError:
            if len(pairs) == 1:
                raise
            continue  # a stage that answers nothing: the tokenizer, the reward model
        compared += 1
        print(f"\n{format_table(found, one, other)}")
        print(f"\n{report_rows(one, other)} -> {write(found, one, other)}")
    if not compared:
        raise ValueError(f"{a} and {b} have no measured stage in common: see python -m sft.eval")


def format_table(found: list[comparison.Comparison], a: Path, b: Path) -> str:
    """A line a metric."""
    lines = [f"A = {a}, B = {b}", f"{'metric':28} {'n':>5} {'A':>9} {'B':>9}  B - A"]
    for one in found:
        values = [comparison.show({"value": value, "unit": one.unit}) for value in (one.a, one.b)]
        p = "" if one.p is None else f"  p {one.p:.3f}  {one.verdict}"
        change = comparison.show_difference(one)
        lines.append(f"{one.metric:28} {one.n:5} {values[0]:>9} {values[1]:>9}  {change}{p}")
    return "\n".join(lines)


def report_rows(a: Path, b: Path) -> str:
    """How many rows were paired, and how many only one of the two has."""
    parts = []
    for name, keys in (("answers", ("source", "prompt", "reference")), ("texts", ("sha256",))):
        rows = [comparison.read_jsonl(path / f"{name}.jsonl") for path in (a, b)]
        common = len(comparison.pair_rows(*rows, *keys))
        alone = [len(one) - common for one in rows]
        parts.append(f"{common} {name} in common, {alone[0]} only in A, {alone[1]} only in B")
    return "; ".join(parts)


def write(found: list[comparison.Comparison], a: Path, b: Path) -> Path:
    """compare_<a>.json and .png in b; returns the picture's path."""
    stem = str(b / f"compare_{a.resolve().parent.name}_{a.resolve().name}")
    rows = [one._asdict() | {"verdict": one.verdict} for one in found]
    text = json.dumps({"a": str(a), "b": str(b), "metrics": rows}, indent=1)
    Path(f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    draw(found, f"{b} minus {a}", Path(f"{stem}.png"))
    return Path(f"{stem}.png")


def draw(found: list[comparison.Comparison], title: str, path: Path) -> None:
    """Differences with their intervals, a panel a unit."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    units = list(dict.fromkeys(one.unit for one in found))
    groups = [[one for one in found if one.unit == unit] for unit in units]
    heights = [len(group) + 1 for group in groups]
    figure = Figure(figsize=(8, 1.2 + 0.3 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(units), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, unit, group in zip(axes, units, groups, strict=True):
        scale = 100 if unit == "share" else 1
        for height, one in enumerate(reversed(group)):
            colour = COLOURS.get(one.verdict, "tab:gray")
            if one.low is not None:
                axis.plot([one.low * scale, one.high * scale], [height] * 2, color=colour)
            axis.plot([one.difference * scale], [height], "o", color=colour)
        axis.set_yticks(range(len(group)), [one.metric for one in reversed(group)])
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel("points of a per cent" if unit == "share" else unit)
        axis.margins(y=0.1)
    axes[0].set_title(f"{title}\ngreen: better, red: worse, gray: no difference seen", fontsize=10)
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_a", type=Path, help="a stage's output, or a recipe's: output/tiny/sft")
    parser.add_argument("run_b", type=Path, help="the other one; differences are run_b - run_a")
    arguments = parser.parse_args()
    with stages.plain_errors():
        main(arguments.run_a, arguments.run_b)
