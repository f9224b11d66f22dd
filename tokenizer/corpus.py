"""Read rows and documents from what people have, and split them for validation.

Files: .txt .dev .devtest (text), .jsonl, .json, .csv, .tsv, .parquet, each also with .gz or .zst;
a folder of these; a glob; a folder that `datasets.save_to_disk` wrote; or the name of a Hub data
set, "user/name[:config[:split]]" (needs the network; HF_ENDPOINT names a mirror). Nothing is
skipped without a word: a row that cannot be read is a `ValueError` that names the file and the
line, or with `BadRows("skip")` it is counted and kept in a list.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from tokenizer.bad_rows import BadRows
from tokenizer.files import is_hub_name, list_files
from tokenizer.formats import Reading, Row, read_file, read_hub_rows, shorten

__all__ = ["BadRows", "Row", "is_hub_name", "list_files", "shorten"]  # and what stands below
TXT_DOCUMENTS = ("file", "line", "paragraph")
TEXT_FIELDS = ("text", "content", "paragraphs")


class Documents(Iterator[str]):
    """An iterator over documents.

    Attributes:
        read: documents given. empty: rows without text, left out. position: rows passed so far,
            which is what `start` takes to go on behind them. source: of the last one, file:line.
    """

    def __init__(self, rows: Iterator[Row], text_field: str, bad_rows: BadRows, start: int = 0):
        self.read = self.empty = 0
        self.position = start
        self.source = ""
        self._text_field, self.bad_rows = text_field, bad_rows
        self._rows = self._pass(rows, start) if start else rows

    def __next__(self) -> str:
        for row in self._rows:
            self.position, self.source = self.position + 1, row.source
            text = row.value[self._text_field]
            if text and not text.isspace():
                self.read += 1
                return text
            self.empty += 1
        raise StopIteration

    def _pass(self, rows: Iterator[Row], start: int) -> Iterator[Row]:
        for _ in islice(rows, start):
            pass
        self.bad_rows.messages.clear()  # they were told when those rows were read
        yield from rows


def read_documents(
    data_files: str | list[str],
    text_field: str = "text",
    txt_documents: str = "file",
    encoding: str | None = None,
    bad_rows: BadRows | None = None,
    start: int = 0,
) -> Documents:
    """Iterate over the documents of `data_files`, in the order of the files.

    Args:
        data_files: what `list_files` takes, or the name of a Hub data set (streamed).
        text_field: field that holds the text. Where the default is absent, "content" and then
            "paragraphs" (a list of strings, joined by newlines) are taken.
        txt_documents: what a document of a .txt file is: the "file", as a play is one text, each
            "line", or each "paragraph" between blank lines. A .dev file has a sentence a line.
        encoding, bad_rows: as `read_rows` takes them.
        start: rows to pass over, a `position` of an earlier reading.

    Raises ValueError for a row without text, with file, line, the fields found and an example.
    """
    if txt_documents not in TXT_DOCUMENTS:
        raise ValueError(f"txt_documents={txt_documents!r}; choose one of {list(TXT_DOCUMENTS)}")
    bad_rows = bad_rows or BadRows()
    options = {"txt_documents": txt_documents, "encoding": encoding, "bad_rows": bad_rows}
    rows = read_rows(data_files, streaming=True, text_field=text_field, **options)
    return Documents(rows, text_field, bad_rows, start)


def _require_text(rows: Iterable[Row], text_field: str, bad_rows: BadRows) -> Iterator[Row]:
    """Rows with a text in that field, wherever `get_text` finds it; the others are refused."""
    for row in rows:
        if type(row.value.get(text_field)) is not str:
            try:
                row = row._replace(value={text_field: get_text(row, text_field)})
            except ValueError as error:
                bad_rows.refuse(str(error))
                continue
        yield row


def get_text(row: Row, text_field: str = "text") -> str:
    """Return the text of one row; a null gives "". Raises ValueError where the row has none."""
    names = TEXT_FIELDS if text_field == "text" else (text_field,)
    name = next((name for name in names if name in row.value), None)
    if name is None:
        raise ValueError(
            f"{row.source}: no field {' or '.join(names)}; the row has {list(row.value)}. Pass "
            "--text_field NAME to the stages that take it, or write rows such as "
            f'{{"{names[0]}": "Once upon a time ..."}}'
        )
    value = "" if row.value[name] is None else row.value[name]
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(
            f"{row.source}: field {name!r} must be a text or a list of texts, not "
            f'{shorten(value)}; such as {{"{name}": "Once upon a time ..."}}'
        )
    return "\n".join(parts)


def read_rows(
    data_files: str | list[str],
    columns: list[str] | None = None,
    txt_documents: str = "file",
    encoding: str | None = None,
    bad_rows: BadRows | None = None,
    streaming: bool = False,
    text_field: str | None = None,
) -> Iterator[Row]:
    """Iterate over the rows of `data_files`, in the order of the files; the Hub's come last.

    A text file gives rows {"text": ...}, and so does a JSON array of plain strings. A .csv file
    starts with a header. A .tsv file has no quoting (a quote is a quote); its first line is a
    header where every cell is an identifier, else the fields are "column_1", "column_2", ...

    Args:
        columns: the fields of .csv and .tsv files without a header.
        encoding: of text that is not UTF-8: a name that Python knows, or "auto" for the likeliest.
        bad_rows: what becomes of rows that cannot be read; None makes the first an error.
        streaming: read Hub data over the network without keeping it, as a corpus of terabytes
            asks for; else it is downloaded once. Offline (HF_HUB_OFFLINE=1) the download is read.
        text_field: where each row must have a text, found as `read_documents` says; None for any.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: unknown ending, not UTF-8, a row that is no row, a file without one row to read.
    """
    names = [data_files] if isinstance(data_files, str | Path) else list(data_files)
    hub = [name for name in names if is_hub_name(name)]
    paths = [name for name in names if name not in hub]
    reading = Reading(columns, txt_documents, encoding, bad_rows or BadRows())
    files = list_files(paths) if paths or not hub else []
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
    opened = chain(
        ((str(path), read_file(path, reading)) for path in files),
        ((name, read_hub_rows(name, streaming and not offline)) for name in hub),
    )
    for name, rows in opened:
        row, refused = None, reading.bad_rows.count
        for row in _require_text(rows, text_field, reading.bad_rows) if text_field else rows:
            yield row
        if row is None:
            refused = reading.bad_rows.count - refused
            why = f"none of its {refused} rows can be read" if refused else "it is empty"
            found = (one for one in reversed(reading.bad_rows.messages) if one.startswith(name))
            last = "".join(f". Its last: {one}" for one in islice(found, 1))
            raise ValueError(f"{name}: {why}; remove it from data_files{last}")


def split_documents(
    documents: Iterable[str], validation_share: float, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Split documents into (train, validation), the same way in any order.

    A document goes where the hash of its text says, so that duplicates stay on one side. A long
    one, which alone holds more than a fifth of the validation share of all characters (a play, or
    any document where there are few), is cut instead: its end is validation, as in nanoGPT.

    Raises ValueError for a share outside of (0, 1), or a side that would be empty.
    """
    documents, train, validation = list(documents), [], []
    characters = sum(map(len, documents))
    for document in documents:
        cut = find_cut(document, validation_share, characters, seed)
        train += [document[:cut]] if document[:cut].strip() else []
        validation += [document[cut:]] if document[cut:].strip() else []
    check_split(train, validation, validation_share)
    return train, validation


def find_cut(document: str, validation_share: float, characters: float, seed: int = 0) -> int:
    """Where the validation side of a document begins, in a corpus of so many `characters`.

    At 0 or at its end, as the hash of the text says; before its end where it is a long one.
    """
    if len(document) <= characters * validation_share / 5:
        return 0 if hash_share(document, seed) < validation_share else len(document)
    # At the end of a line, or else of a word, where one is near.
    target = round(len(document) * (1 - validation_share))
    near = target - int(len(document) * validation_share / 2)
    cuts = [document.rfind(mark, near, target) + 1 for mark in ("\n", " ")]
    return next(filter(None, cuts), target)


def check_split(train: list, validation: list, validation_share: float) -> None:
    """Raise ValueError for a share outside of (0, 1) or an empty side."""
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share={validation_share} must lie between 0 and 1")
    if not train or not validation:
        side = "validation" if train else "train"
        raise ValueError(f"the {side} side is empty: change {validation_share=} or add data")


def hash_share(text: str, seed: int) -> float:
    """Map a text to a number in [0, 1), evenly, by SHA-256."""
    digest = hashlib.sha256(f"{seed}\n{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
