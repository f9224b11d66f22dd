"""Files -> rows: text, JSON lines, JSON, CSV, TSV, parquet, and saved data sets.

A row that cannot be read is told with file, line, what was expected and an example; `Reading` says
whether that is an error or a row to count and leave out.
"""

import csv
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizer.bad_rows import BadRows
from tokenizer.files import TEXT_ENDINGS, find_ending
from tokenizer.lines import open_file, read_lines

LARGEST_DOCUMENT = 1 << 24  # characters; larger text files are cut at line ends, to bound memory
JSON_CHUNK = 1 << 20  # characters; what of a .json file is in memory, or its largest value
JSON_EXAMPLE = 'Expected an object a line, such as {"text": "Once upon a time ..."}'
ARRAY_EXAMPLE = 'Expected [{"text": "Once upon a time ..."}, {"text": "..."}]'
TABLE_EXAMPLE = 'Expected a header such as text,label and rows such as "Well, yes",ham'

_GAP = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder()


class Row(NamedTuple):
    """One row of a file. `source` says where it stands, such as "data/x.jsonl:12"."""

    source: str
    value: dict[str, Any]


class Reading(NamedTuple):
    """How files are read; the arguments of `tokenizer.corpus.read_rows`."""

    columns: list[str] | None = None
    txt_documents: str = "file"
    encoding: str | None = None
    bad_rows: BadRows = BadRows()  # which raises, and so stays empty


def read_file(path: Path, reading: Reading) -> Iterator[Row]:
    """The rows of one file, or of a folder that `datasets.save_to_disk` wrote."""
    ending = find_ending(path)
    if path.is_dir():
        return _read_saved_dataset(path)
    if ending == ".parquet":
        return _read_parquet(path)
    # Without one line of a text or of a quoted cell, the rest would mean something else.
    is_line_a_row = ending in (".jsonl", ".tsv") or reading.txt_documents == "line"
    lines = read_lines(path, reading.encoding, reading.bad_rows if is_line_a_row else None)
    if ending in TEXT_ENDINGS:
        return _read_text(path, lines, reading.txt_documents if ending == ".txt" else "line")
    if ending in (".csv", ".tsv"):
        return _read_table(path, lines, reading)
    if ending == ".json":
        return _read_values(path, lines, reading.bad_rows)
    return _read_json_lines(path, lines, reading.bad_rows)


def _read_text(path: Path, numbered: Iterable[tuple[int, str]], unit: str) -> Iterator[Row]:
    lines, start, size = [], 1, 0
    for number, line in numbered:
        ends = unit == "paragraph" and not line.strip()
        if lines and (ends or unit == "line" or size >= LARGEST_DOCUMENT):
            yield Row(f"{path}:{start}", {"text": "".join(lines)})
            lines, size = [], 0
        if not ends:
            start = start if lines else number
            # The last newline belongs to a file, but not to a sentence.
            lines.append(line.removesuffix("\n") if unit == "line" else line)
            size += len(line)
    if lines:
        yield Row(f"{path}:{start}", {"text": "".join(lines)})


def _read_json_lines(
    path: Path, lines: Iterable[tuple[int, str]], bad_rows: BadRows
) -> Iterator[Row]:
    for number, line in lines:
        line = line.removesuffix("\n")  # an error is in this line, not behind it
        try:
            value, end = _decode_json(path, line, 0, number) if line[:1] == "{" else (None, 0)
            if end and not line[end:].strip():
                rows = (Row(f"{path}:{number}", value),)
            else:  # a blank line, an array, several values, or spaces before one
                rows = tuple(_read_values(path, [(number, line)], BadRows()))
        except ValueError as error:
            shown = str(error)
            bad_rows.refuse(shown if "Expected" in shown else f"{shown}. {JSON_EXAMPLE}")
            continue
        yield from rows


def _read_values(
    path: Path, lines: Iterable[tuple[int, str]], bad_rows: BadRows
) -> Iterator[Row]:
    """An array of objects (or of strings), or objects one after the other, in bounded memory."""
    text = _Text(lines)
    text.skip_gap()
    is_array = text.starts_with("[")
    if is_array:
        text.position += 1
        text.skip_gap()
    while text.position < len(text.held) and not text.starts_with("]"):
        try:
            value = text.decode(path)
            row = _make_row(f"{path}:{text.line}", value)
        except ValueError as error:
            if bad_rows.skips and text.end is None and is_array:
                raise ValueError(
                    f"{error}: what follows in this array cannot be told apart, so this row "
                    f"cannot be skipped. Mend it, or write one object a line. {ARRAY_EXAMPLE}"
                ) from None
            bad_rows.refuse(f"{error}. {ARRAY_EXAMPLE if is_array else JSON_EXAMPLE}")
            text.pass_value()
            continue
        yield row
        text.pass_value()
    if text.rest().strip() != "]" * is_array:
        raise ValueError(
            f"{path}:{text.line}: an array must end with ']', and the file with it. {ARRAY_EXAMPLE}"
        )


class _Text:
    """A text that is read piece by piece, and the place of the next JSON value in it."""

    def __init__(self, lines: Iterable[tuple[int, str]]):
        self._lines = iter(lines)
        self.held, self.position, self.line, self._counted = "", 0, 1, 0
        self.end: int | None = None  # of the value at `position`, once it is decoded
        self._read_more(is_first=True)

    def starts_with(self, mark: str) -> bool:
        return self.held.startswith(mark, self.position)

    def skip_gap(self) -> None:
        """Go on to the next value, and count the lines up to it."""
        self.position = _GAP.match(self.held, self.position).end()
        while self.position == len(self.held) and self._read_more():
            self.position = _GAP.match(self.held, self.position).end()
        self._count_lines()

    def decode(self, path: Path) -> Any:
        """The value at `position`; raises ValueError, with `end` None where it has no end."""
        self.end = None
        while True:
            try:
                # `line` is where `position` is; before it the line may have begun elsewhere.
                value, self.end = _decode_json(path, self.held, self.position, self.line)
                return value
            except _CutOff:
                if not self._read_more():
                    raise
            except _HalfCharacter as error:
                self.end = error.end
                raise

    def pass_value(self) -> None:
        """Go behind the value, or behind its line where it has no end."""
        if self.end is None:
            end = self.held.find("\n", self.position)
            self.end = len(self.held) if end < 0 else end
        self.position, self.end = self.end, None
        self.skip_gap()

    def rest(self) -> str:
        """What is left, read far enough to see whether it is blank."""
        while len(self.held) - self.position < 1000 and self._read_more():
            pass
        return self.held[self.position :]

    def _read_more(self, is_first: bool = False) -> bool:
        self._count_lines()
        pieces, size = [], 0
        for number, line in self._lines:
            if is_first and not pieces:
                self.line = number
            pieces.append(line)
            size += len(line)
            if size >= max(JSON_CHUNK, len(self.held) - self.position):  # doubles: linear in all
                break
        self.held = self.held[self.position :] + "".join(pieces)
        self.position = self._counted = 0
        return bool(pieces)

    def _count_lines(self) -> None:
        self.line += self.held.count("\n", self._counted, self.position)
        self._counted = self.position


class _CutOff(ValueError):
    """Malformed JSON that may be whole where more of the text is read."""


class _HalfCharacter(ValueError):
    """A value with half of a surrogate pair, which ends at `end`."""

    def __init__(self, message: str, end: int):
        super().__init__(message)
        self.end = end


def _decode_json(path: Path, text: str, position: int, line: int) -> tuple[Any, int]:
    """Decode the JSON value at `position` of `text`, which is in line number `line`."""
    try:
        value, end = _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        line += text.count("\n", position, error.pos)
        around = text[max(0, error.pos - 30) : error.pos + 30].replace("\n", "\\n")
        message = f"malformed JSON at column {error.colno}: {error.msg}; around it: {around}"
        is_cut = error.msg.startswith("Unterminated") or error.pos > len(text) - 16
        raise (_CutOff if is_cut else ValueError)(f"{path}:{line}: {message}") from None
    except RecursionError:
        raise ValueError(f"{path}:{line}: JSON nested too deeply") from None
    except ValueError:  # Python's limit
        digits = f"a number of more than {sys.get_int_max_str_digits():,} digits"
        raise ValueError(f"{path}:{line}: {digits}; write it as a text, in quotes") from None
    # Half of a character, as cut-off emoji leave it, could not be tokenized or written.
    if "\\u" in text[position:end]:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            message = f"{path}:{line}: half of a surrogate pair; mend the text ({error})"
            raise _HalfCharacter(message, end) from None
    return value, end


def _make_row(source: str, value: Any) -> Row:
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        raise ValueError(f'{source}: a row must be an object {{"text": ...}}, not {shorten(value)}')
    return Row(source, value)


def _read_table(path: Path, lines: Iterable[tuple[int, str]], reading: Reading) -> Iterator[Row]:
    ending, names, bad_rows = find_ending(path), reading.columns, reading.bad_rows
    for number, cells in _read_cells(path, ending, lines, bad_rows):
        if names is None and any(cells):
            names = [cell.strip() for cell in cells]
            if ending == ".csv" or all(name.isidentifier() for name in names if name):
                _check_header(f"{path}:{number}", names)
                continue
            names = [f"column_{position}" for position in range(1, len(cells) + 1)]
        if any(cells):
            try:
                row = _make_table_row(f"{path}:{number}", names, cells)
            except ValueError as error:
                breaks = sum(cell.count("\n") for cell in cells)
                upto = f" It goes on to line {number + breaks}, in quotes." if breaks else ""
                bad_rows.refuse(f"{error}.{upto} {TABLE_EXAMPLE}")
                continue
            yield row


def _read_cells(
    path: Path, ending: str, lines: Iterable[tuple[int, str]], bad_rows: BadRows
) -> Iterator[tuple[int, list[str]]]:
    old_ends = (
        "CR alone outside of quotes, as old Macs end lines. Convert a copy: "
        f"tr '\\r' '\\n' < {path.name} > copy"
    )
    if ending == ".tsv":
        for number, line in lines:
            if number == 1 and "\r" in line and not line.endswith("\n"):  # it is the whole file
                raise ValueError(f"{path}:1: {old_ends}")
            yield number, line.rstrip("\n").split("\t")
        return
    # The library's limit of 131,072 characters a cell is shorter than many documents.
    csv.field_size_limit(1 << 30)
    reader, number, cells = csv.reader((line for _, line in lines), strict=True), 1, None
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            what = old_ends if "new-line" in str(error) else error
            message = f"{path}:{number}: malformed row: {what}"
            if reader.line_num > number:  # a quote took other rows in, perhaps all of them
                raise ValueError(
                    f"{message}. A quote opens in this row, and up to line {reader.line_num} "
                    "nothing closes it rightly: what is a row there cannot be told, nor skipped. "
                    f"Close the quote, or double it where it belongs to the text. {TABLE_EXAMPLE}"
                ) from None
            bad_rows.refuse(f"{message}. {TABLE_EXAMPLE}")
        else:
            if cells is None:
                return
            yield number, cells
        number = reader.line_num + 1


def _check_header(source: str, names: list[str]) -> None:
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"{source}: the header names the column {twice!r} twice: {shorten(names)}. Name each "
            f"column once. {TABLE_EXAMPLE}"
        )


def _make_table_row(source: str, names: list[str], cells: list[str]) -> Row:
    pairs = list(zip(names, cells, strict=False))
    # Spreadsheets leave columns without a name, left out here as long as they are empty.
    named = [(name, cell) for name, cell in pairs if name or cell]
    what = f"{len(cells)} cells {shorten(cells)} do not fit the {len(names)} columns {names}"
    if len(cells) != len(names):
        raise ValueError(f"{source}: {what}. Quote cells that hold the delimiter")
    if "" in dict(named):
        what = f"the cell {shorten(dict(named)[''])} stands in a column without a name: {names}"
        raise ValueError(f"{source}: {what}. Name each column in the header")
    return Row(source, dict(named))


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    with open_file(path) as file, tempfile.TemporaryFile() as whole:
        try:
            if path.suffix.lower() != ".parquet":  # it is read from its end
                shutil.copyfileobj(file, whole)
                file = whole
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000)
            values = (value for batch in batches for value in batch.to_pylist())
            yield from (Row(f"{path}:{number}", value) for number, value in enumerate(values, 1))
        except (pyarrow.ArrowInvalid, OSError, EOFError) as error:
            raise ValueError(
                f"{path}: not a readable parquet file ({error}). Expected one as "
                "datasets.Dataset.to_parquet writes it; fetch it again"
            ) from None


def _read_saved_dataset(path: Path) -> Iterator[Row]:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, dict):
        raise ValueError(f"{path}: holds the splits {list(loaded)}; name one, {path}/<split>")
    yield from (Row(f"{path}:{number}", value) for number, value in enumerate(loaded, 1))


def read_hub_rows(name: str, streaming: bool) -> Iterator[Row]:
    """The rows of "user/name[:config[:split]]" on the Hugging Face Hub; the split is "train".

    Args:
        streaming: read over the network without keeping; else download once, into the Hub's cache.

    Raises FileNotFoundError where it cannot be loaded.
    """
    import datasets

    repository, config, split = (name.split(":") + [None, None])[:3]
    options = {"split": split or "train", "streaming": streaming}
    try:
        loaded = datasets.load_dataset(repository, config, **options)
    except Exception as error:
        message = f"{name}: no such file, nor does the Hub load it (needs the network)"
        raise FileNotFoundError(f"{message}: {error}") from error
    yield from (Row(f"{name}:{number}", value) for number, value in enumerate(loaded, 1))


def shorten(value: Any, length: int = 80) -> str:
    """Show a value in a message, cut to `length` characters."""
    shown = repr(value)
    return shown if len(shown) <= length else shown[: length - 3] + "..."
