"""How inspect_data.py shows rows: as text for a terminal, and as a page of HTML.

The page is in inspect_data.html.jinja; whatever stands in the data is shown as text.
"""

import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jinja2

BARS = 32  # of the length histogram
COUNTED = 20_000  # rows that lengths, duplicates and languages are of, at most


class Box(NamedTuple):
    """A token: its text, id, and what it is (trained, end, border, differs, score)."""

    text: str
    id: int
    flags: tuple[str, ...]


class Side(NamedTuple):
    """A sequence of a row: a title ("" of a single one) and its tokens."""

    title: str
    boxes: list[Box]


@dataclass
class View:
    """All that the page shows."""

    stage: str
    config: str
    limit: int | None  # tokens; longer rows are cut or left out
    beyond: str = ""  # what becomes of a row that is longer
    notes: list[str] = field(default_factory=list)
    rows: list[tuple[str, list[Side]]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    trained_tokens: int = 0
    tokens: int = 0
    with_end: int = 0
    duplicates: int = 0
    languages: Counter = field(default_factory=Counter)

    @property
    def too_long(self) -> int:
        """Rows with more tokens than the limit."""
        return sum(length > self.limit for length in self.lengths) if self.limit else 0


def histogram(view: View) -> list[tuple[int, int, int]]:
    """(from, to, rows) of equal steps from 1 to the longest row, or to the limit."""
    longest = max([*view.lengths, view.limit or 1], default=1)
    step = -(-longest // BARS)
    counts = Counter(max(length - 1, 0) // step for length in view.lengths)
    return [(i * step + 1, (i + 1) * step, counts[i]) for i in range(-(-longest // step))]


def summarize(view: View) -> list[tuple[str, str]]:
    """The numbers of the page, as text."""
    rows = len(view.lengths)
    counted = f"{rows:,}" + (" (the first ones)" if rows == COUNTED else "")
    numbers = [("rows", counted), ("tokens", f"{view.tokens:,}")]
    if view.trained_tokens:
        share = view.trained_tokens / max(view.tokens, 1)
        numbers.append(("trained", f"{share:.1%} of the tokens"))
    ordered = sorted(view.lengths) or [0]
    numbers.append(("length", f"median {ordered[rows // 2]:,}, longest {ordered[-1]:,}"))
    if view.limit:
        over = f"{view.too_long:,} ({view.too_long / max(rows, 1):.1%}) {view.beyond}"
        numbers.append((f"over {view.limit:,} tokens", over))
    languages = ", ".join(f"{name} {count:,}" for name, count in view.languages.most_common())
    return [
        *numbers,
        ("with an end token", f"{view.with_end / max(rows, 1):.1%}"),
        ("exact duplicates", f"{view.duplicates:,} ({view.duplicates / max(rows, 1):.1%})"),
        ("languages", languages),
    ]


def format_terminal(view: View, colours: bool) -> str:
    """Numbers, histogram and three rows, for a terminal; without colours in brackets."""
    lines = [f"{view.stage}: {view.config}", *(f"  {note}" for note in view.notes), ""]
    lines += [f"  {name:20} {value}" for name, value in summarize(view)]
    bars = histogram(view)
    most = max(count for *_, count in bars) or 1
    lines += ["", "  tokens a row"]
    for low, high, count in bars:
        mark = " <- the limit" if view.limit and low <= view.limit <= high else ""
        if count or mark:
            lines.append(f"  {low:6}-{high:<6} {'#' * round(40 * count / most):40} {count:,}{mark}")
    lines += ["", "  [trained] and not trained tokens, | between them" if not colours else ""]
    for title, sides in view.rows[:3]:
        lines += ["", f"  {title}"]
        for side in sides:
            lines.append(f"  {side.title:9}" + "|".join(_show(box, colours) for box in side.boxes))
    width = shutil.get_terminal_size().columns if colours else 10_000
    return "\n".join(line if colours else line[:width] for line in lines)


def _show(box: Box, colours: bool) -> str:
    text = "".join(c if c.isprintable() else {"\n": "↵", "\t": "⇥"}.get(c, "·") for c in box.text)
    if not colours:
        return f"[{text}]" if "trained" in box.flags else text
    colour = "31" if "end" in box.flags else "32" if "trained" in box.flags else "90"
    return f"\x1b[{'7;' if 'border' in box.flags else ''}{colour}m{text}\x1b[0m"


def render_page(view: View) -> str:
    """The view as one HTML page; the data is escaped wherever it stands."""
    here = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=here, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters["ordinal"] = ord
    bars = histogram(view)
    return page.get_template("inspect_data.html.jinja").render(
        view=view, numbers=summarize(view), bars=bars, most=max(n for *_, n in bars) or 1
    )
