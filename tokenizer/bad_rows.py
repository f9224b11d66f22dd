"""What happens to rows that cannot be read: an error, or counted, shown and left out."""

import os
from pathlib import Path

SHOWN = 10


class BadRows:
    """Collects the rows that could not be read; `on_bad_row` "raise" makes the first an error.

    Attributes:
        messages: one a row, with file and line; whoever keeps them elsewhere may clear the list.
        count: all that were ever refused.
    """

    def __init__(self, on_bad_row: str = "raise"):
        """Raises ValueError for a word other than "raise" and "skip"."""
        if on_bad_row not in ("raise", "skip"):
            raise ValueError(f"on_bad_row={on_bad_row!r}; choose raise or skip")
        self.skips = on_bad_row == "skip"
        self.messages: list[str] = []
        self.count = 0

    def refuse(self, message: str) -> None:
        """Count a row, or raise a ValueError with its message."""
        if not self.skips:
            raise ValueError(message)
        self.messages.append(message)
        self.count += 1

    def report(self, stage: str, directory: str | os.PathLike) -> None:
        """Print the first messages and write all to `bad_rows.txt`, one a line; or do nothing."""
        if self.messages:
            path = Path(directory, "bad_rows.txt")
            lines = (message.replace("\n", "\\n") + "\n" for message in self.messages)
            path.write_text("".join(lines), encoding="utf-8")
            print(f"{stage}: {self}\n  all of them: {path}")

    def __str__(self) -> str:
        shown = self.messages[:SHOWN]
        more = len(self.messages) - len(shown)
        lines = [f"{len(self.messages):,} rows could not be read and were left out:", *shown]
        return "\n  ".join(lines + ([f"... and {more:,} more"] if more else []))
