"""Conversations: read, mix, split. How a row is understood is `sft/formats.py`."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from sft.formats import (
    LAYOUTS,
    LOSS_WEIGHTS,
    Layout,
    Refused,
    check_turns,
    find_layout,
    read_weight,
)
from tokenizer.corpus import Row, check_split, hash_share, read_rows
from tokenizer.mixture import has_shares, parse_shares


@dataclass
class DataSummary:
    """What became of the rows: counts, and by reason the sources of all that was dropped."""

    layouts: dict[str, int] = field(default_factory=dict)
    rows_read: int = 0
    rows_kept: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    rows_with_end: int = 0

    @property
    def layout(self) -> str:
        """The layout, such as "alpaca (instruction, input, output)"; several with their rows."""
        several = [f"{name}: {count:,} rows" for name, count in self.layouts.items()]
        return "; ".join(several if len(several) > 1 else self.layouts)

    @property
    def trained_share(self) -> float:
        """Share of the tokens that the loss sees."""
        return self.trained_tokens / max(self.tokens, 1)

    @property
    def end_share(self) -> float:
        """Share of the kept rows in which each assistant turn has its end token, trained."""
        return self.rows_with_end / max(self.rows_kept, 1)

    def drop(self, reason: str, source: str) -> None:
        """Count one dropped row."""
        self.dropped.setdefault(reason, []).append(source)

    def add(self, other: "DataSummary") -> None:
        """Count another source's rows, of layouts read and dropped, with these."""
        for layout, count in other.layouts.items():
            self.layouts[layout] = self.layouts.get(layout, 0) + count
        for reason, sources in other.dropped.items():
            self.dropped.setdefault(reason, []).extend(sources)
        self.rows_read += other.rows_read
        self.rows_kept += other.rows_kept

    def add_rendered(self, other: "DataSummary") -> None:
        """Take over what became of these rows when they were rendered: tokens, rows too long."""
        for reason, sources in other.dropped.items():
            self.dropped.setdefault(reason, []).extend(sources)
        for name in ("rows_kept", "tokens", "trained_tokens", "longest", "rows_with_end"):
            setattr(self, name, getattr(other, name))

    def check_kept(self) -> None:
        """Raise ValueError where no row is left."""
        if not self.rows_kept:
            raise ValueError(f"no row is left to train on.\n{self}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for run.json; of the dropped rows the counts only."""
        return {**vars(self), "dropped": {why: len(rows) for why, rows in self.dropped.items()}}

    def __str__(self) -> str:
        lines = [f"layout   {self.layout}"] if self.layouts else []
        lines.append(f"rows     {self.rows_read:,} read, {self.rows_kept:,} kept")
        for reason, sources in self.dropped.items():
            lines.append(f"dropped  {len(sources):,} x {reason} (first: {sources[0]})")
        if self.tokens:
            lines.append(
                f"tokens   {self.tokens:,}, {self.trained_share:.1%} trained, longest row "
                f"{self.longest:,}, end token trained in {self.end_share:.1%} of the rows"
            )
        return "\n".join(lines)


def load_conversations(data_files: str | list[str]) -> tuple[list[dict[str, Any]], DataSummary]:
    """Read rows of any layout of `LAYOUTS` as {"messages": [{"role", "content"}, ...], ...}.

    Other fields ("kind", "lang", ...) stay beside `messages`.

    Raises:
        ValueError: a row that cannot be read (file, line, fields found, an example), or none left.
    """
    return load_rows(data_files, lambda row: find_layout(row, LAYOUTS), read_conversation)


def load_rows(
    data_files: str | list[str],
    find: Callable[[Row], Layout],
    read: Callable[[Row, Layout], dict[str, Any]],
) -> tuple[list[dict[str, Any]], DataSummary]:
    """Read each row: `find` its layout, then `read` it; `read` raises `Refused` to drop the row."""
    rows, summary = [], DataSummary()
    for row in read_rows(data_files):
        summary.rows_read, layout = summary.rows_read + 1, find(row)
        summary.layouts[layout.name] = summary.layouts.get(layout.name, 0) + 1
        # The fields that the layout does not know ("kind", "lang", ...) stay beside.
        own = (*layout.needs, *layout.optional, "system", "tools", "loss_weight")
        extras = {name: value for name, value in row.value.items() if name not in own}
        try:
            rows.append({**extras, **read(row, layout)})
        except Refused as reason:
            summary.drop(str(reason), row.source)
    summary.rows_kept = len(rows)
    summary.check_kept()
    return rows, summary


def read_conversation(row: Row, layout: Layout) -> dict[str, Any]:
    messages = layout.read(row)
    check_turns(messages, last="assistant")
    weight = read_weight(row, row.value, names=LOSS_WEIGHTS[:1])
    if weight not in (None, 1):  # of the whole row, on top of the turns' own
        for turn in messages:
            if turn["role"] == "assistant":
                turn["loss_weight"] = weight * turn.get("loss_weight", 1)
    return {"messages": messages}


def load_mixture(
    data_files: list[str], seed: int = 0
) -> tuple[list[dict[str, Any]], DataSummary]:
    """Conversations of several sources, each with its share of the rows where shares are given.

    `[chat.jsonl@0.7, maths.jsonl@0.3]`: the mixture is as large as it can be without repeating a
    row, so one source gives all it has; of the others `seed` chooses, and the rest is counted as
    dropped.

    Raises:
        ValueError: as `load_conversations` and `tokenizer.mixture.parse_shares`.
    """
    if not has_shares(data_files):
        return load_conversations(data_files)
    shares, whole = parse_shares(data_files), DataSummary()
    sources = {}
    for name in shares:
        sources[name], summary = load_conversations(name)
        whole.add(summary)
    size = min(len(rows) / shares[name] for name, rows in sources.items())
    mixture = []
    for name, rows in sources.items():
        wanted = max(1, math.floor(size * shares[name] + 0.5))
        chosen = sorted(random.Random(f"{seed} {name}").sample(range(len(rows)), wanted))
        mixture += [rows[position] for position in chosen]
        for _ in range(len(rows) - wanted):
            whole.drop(f"more than a share of {shares[name]:.0%} of the rows", name)
    whole.rows_kept = len(mixture)
    return mixture, whole


def split_rows(
    rows: list[dict[str, Any]], *shares: float, seed: int = 0
) -> list[list[dict[str, Any]]]:
    """Split rows into [train, a side for each share] by a hash of the first text of the user.

    `split_rows(rows, 0.05, 0.1)` gives 85 % to train, 5 % and 10 % to the others. The same prompt
    lands on the same side, in any order and on any machine. Rows have `messages` or `prompt`.
    Raises ValueError for shares outside of (0, 1) or an empty side.
    """
    edges = list(accumulate(shares))
    sides: list[list] = [[] for _ in range(len(shares) + 1)]
    for row in rows:
        place = hash_share(get_first_user(row), seed)
        side = next((n for n, edge in enumerate(edges, 1) if place < edge), 0)
        sides[side].append(row)
    for side, share in zip(sides[1:], shares, strict=True):
        check_split(sides[0], side, share)
    return sides


def get_first_user(row: dict[str, Any]) -> str:
    messages = row["messages"] if "messages" in row else row["prompt"]
    return next(message["content"] for message in messages if message["role"] == "user")
