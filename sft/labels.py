"""Rows with a text and a label: duplicates out, classes balanced, then split.

The order matters. A text that stands in two splits would be recognised instead of classified, so
duplicates go first; and a model that always says the larger class would look good, so the classes
are made equal before the split.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

from tokenizer.corpus import Row, hash_share, read_rows, shorten

TEXT_COLUMNS = ("text", "sentence", "content", "message", "review")
LABEL_COLUMNS = ("label", "labels", "category", "class")
SPLITS = ("train", "validation", "test")


class Labelled(NamedTuple):
    """A text and its label, both as they are written."""

    text: str
    label: str


@dataclass
class LabelSummary:
    """What became of the rows."""

    rows_read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    splits: dict[str, dict[str, int]] = field(default_factory=dict)  # split -> label -> rows

    def drop(self, reason: str, count: int = 1) -> None:
        """Count dropped rows."""
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def __str__(self) -> str:
        lines = [f"rows     {self.rows_read:,} read"]
        lines += [f"dropped  {count:,} x {reason}" for reason, count in self.dropped.items()]
        for split, labels in self.splits.items():
            counts = ", ".join(f"{label} {count:,}" for label, count in labels.items())
            lines.append(f"{split:9}{sum(labels.values()):,} rows: {counts}")
        return "\n".join(lines)


def load_splits(
    files: dict[str, list[str]],
    columns: tuple[str | None, str | None] = (None, None),
    shares: tuple[float, float] = (0.1, 0.2),
    balance: bool = True,
    seed: int = 0,
) -> tuple[dict[str, list[Labelled]], LabelSummary]:
    """Read, clean and split labelled rows.

    Args:
        files: data files by split. Where "validation" or "test" has none, its share is cut from
            "train".
        columns: names of the text and label columns; None takes a usual name.
        shares: of "train" that becomes validation and test.
        balance: cut every class down to the smallest one: before the split, and where a split has
            its own files in "train" alone, so that a test set stays what it is.
        seed: decides which rows go where; the order of the rows does not.

    Raises:
        ValueError: a row without text or label, one class alone, or an empty split.
    """
    summary, seen = LabelSummary(), {}
    rows = {}
    for split in reversed(SPLITS):  # a text that is also in the test set leaves the training set
        found = read_labelled(files[split], columns, summary) if files.get(split) else []
        rows[split] = remove_duplicates(found, seen, summary)
    if balance:
        rows["train"] = balance_classes(rows["train"], seed, summary)
    wanted = {
        split: share
        for split, share in zip(SPLITS[1:], shares, strict=True)
        if not files.get(split)
    }
    train, *cut = split_by_label(rows["train"], list(wanted.values()), seed)
    rows |= {"train": train} | dict(zip(wanted, cut, strict=True))
    summary.splits = {
        split: dict(sorted(Counter(row.label for row in rows[split]).items())) for split in SPLITS
    }
    check_splits(summary)
    return rows, summary


def read_labelled(
    data_files: list[str], columns: tuple[str | None, str | None], summary: LabelSummary
) -> list[Labelled]:
    """Read rows; those without a text or a label are dropped and counted."""
    found = []
    for row in read_rows(data_files):
        summary.rows_read += 1
        text = find_cell(row, columns[0], TEXT_COLUMNS, "text_column")
        label = find_cell(row, columns[1], LABEL_COLUMNS, "label_column")
        if not text.strip() or not label.strip():
            summary.drop("no text" if label.strip() else "no label")
            continue
        found.append(Labelled(text, label.strip()))
    return found


def find_cell(row: Row, name: str | None, usual: tuple[str, ...], flag: str) -> str:
    """The text of one column; a number counts as one. None and the empty string are the same."""
    names = [name] if name else [name for name in usual if name in row.value]
    if len(names) != 1 or names[0] not in row.value:
        raise ValueError(
            f"{row.source}: which column is it? Name it with --{flag}; the row has "
            f"{list(row.value)}, looked for {name or ' or '.join(usual)}"
        )
    value = row.value[names[0]]
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{row.source}: {names[0]!r} must be a text, it is {shorten(value)}")
    return "" if value is None else str(value)


def remove_duplicates(
    rows: list[Labelled], seen: dict[str, str], summary: LabelSummary
) -> list[Labelled]:
    """Keep each text once, whatever its case and spaces; none where its labels contradict.

    Args:
        seen: normalised text -> label of the splits before this one; extended.
    """
    labels = defaultdict(set)
    for row in rows:
        labels[normalise(row.text)].add(row.label)
    kept = []
    for row in rows:
        text = normalise(row.text)
        if len(labels[text]) > 1:
            summary.drop("the same text with another label")
        elif text in seen:
            summary.drop("a duplicate")
        else:
            seen[text] = row.label
            kept.append(row)
    return kept


def normalise(text: str) -> str:
    """The text without what makes no other text of it: case and spaces."""
    return " ".join(text.split()).casefold()


def balance_classes(rows: list[Labelled], seed: int, summary: LabelSummary) -> list[Labelled]:
    """As many rows of each class as the smallest one has."""
    classes = group_by_label(rows, seed)
    size = min(map(len, classes.values()), default=0)
    summary.drop("left out to balance the classes", len(rows) - size * len(classes))
    return [row for members in classes.values() for row in members[:size]]


def split_by_label(rows: list[Labelled], shares: list[float], seed: int) -> list[list[Labelled]]:
    """[train, a side for each of `shares`], with the same share of every class in each."""
    if any(not 0 < share < 1 for share in shares) or sum(shares) >= 1:
        raise ValueError(f"the shares {shares} must be above 0 and leave something to train on")
    sides: list[list[Labelled]] = [[] for _ in (0, *shares)]
    for members in group_by_label(rows, seed).values():
        cuts = [0, *(round(share * len(members)) for share in accumulate(shares)), len(members)]
        for number, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False), start=1):
            sides[number % len(sides)] += members[start:end]
    return sides


def group_by_label(rows: list[Labelled], seed: int) -> dict[str, list[Labelled]]:
    """The rows of each class, in an order that only their texts and `seed` decide."""
    classes: dict[str, list[Labelled]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (hash_share(row.text, seed), row.text)):
        classes[row.label].append(row)
    return dict(sorted(classes.items()))


def check_splits(summary: LabelSummary) -> None:
    """Raise ValueError where there is nothing to tell apart, or nothing to measure."""
    known = list(summary.splits["train"])
    for split, labels in summary.splits.items():
        strange = sorted(set(labels) - set(known))
        if strange and known:
            raise ValueError(f"{split} has labels that train does not have: {strange}; {known=}")
        if not labels:
            raise ValueError(f"{split} is empty.\n{summary}")
    if len(known) < 2:
        raise ValueError(f"a classifier needs two labels or more, there is only {known}\n{summary}")


def to_columns(rows: list[Labelled], labels: list[str]) -> dict[str, list[Any]]:
    """The rows as columns: `text`, and `labels` as numbers."""
    return {"text": [row.text for row in rows], "labels": [labels.index(r.label) for r in rows]}
