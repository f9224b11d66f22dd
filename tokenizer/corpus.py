"""Read rows and documents from the files that people have, and split them for validation.

Endings: .txt .dev .devtest (text), .jsonl, .json, .csv, .tsv, .parquet, each also with .gz; or a
folder of these; a glob; a folder that `datasets.save_to_disk` wrote; or the name of a Hub data
set, "user/name[:config[:split]]" (needs the network). Text is UTF-8. Nothing is skipped without a
word: a row that cannot be read is a `ValueError` that names the file and the line.
"""

import csv
import glob
import gzip
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

TEXT_ENDINGS = (".txt", ".dev", ".devtest")
KNOWN_ENDINGS = (*TEXT_ENDINGS, ".jsonl", ".json", ".csv", ".tsv", ".parquet")
ENDINGS_SHOWN = " ".join(KNOWN_ENDINGS) + ", each also with .gz"
TXT_DOCUMENTS = ("file", "line", "paragraph")
TEXT_FIELDS = ("text", "content", "paragraphs")
LARGEST_DOCUMENT = 1 << 24  # characters; larger text files are cut at line ends, to bound memory

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """One row of a file. `source` says where it stands, such as "data/x.jsonl:12"."""

    source: str
    value: dict[str, Any]


class Documents(Iterator[str]):
    """An iterator over documents; `read` and `empty` count what it gave and what it left out."""

    def __init__(self, rows: Iterator[Row], text_field: str):
        self.read = self.empty = 0
        self._rows, self._text_field = rows, text_field

    def __next__(self) -> str:
        for row in self._rows:
            text = get_text(row, self._text_field)
            if text.strip():
                self.read += 1
                return text
            self.empty += 1
        raise StopIteration


def read_documents(
    data_files: str | list[str], text_field: str = "text", txt_documents: str = "file"
) -> Documents:
    """Iterate over the documents of `data_files`, in the order of the files.

    Args:
        data_files: what `list_files` takes, or the name of a Hub data set.
        text_field: field that holds the text. Where the default is absent, "content" and then
            "paragraphs" (a list of strings, joined by newlines) are taken.
        txt_documents: what a document of a .txt file is: the "file", as a play is one text, each
            "line", or each "paragraph" between blank lines. A .dev file has a sentence a line.

    Raises ValueError for a row without text, with file, line, the fields found and an example.
    """
    if txt_documents not in TXT_DOCUMENTS:
        raise ValueError(f"txt_documents={txt_documents!r}; choose one of {list(TXT_DOCUMENTS)}")
    return Documents(read_rows(data_files, txt_documents=txt_documents), text_field)


def get_text(row: Row, text_field: str = "text") -> str:
    """Return the text of one row; a null gives "". Raises ValueError where the row has none."""
    names = TEXT_FIELDS if text_field == "text" else (text_field,)
    name = next((name for name in names if name in row.value), None)
    if name is None:
        raise ValueError(
            f"{row.source}: no field {' or '.join(names)}; the row has {list(row.value)}. Name it "
            f'with text_field, or write rows such as {{"{names[0]}": "Once upon a time ..."}}'
        )
    value = "" if row.value[name] is None else row.value[name]
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(
            f"{row.source}: field {name!r} must be a text or a list of texts, not {shorten(value)}"
        )
    return "\n".join(parts)


def read_rows(
    data_files: str | list[str], columns: list[str] | None = None, txt_documents: str = "file"
) -> Iterator[Row]:
    """Iterate over the rows of `data_files`, in the order of the files; the Hub's come last.

    A text file gives rows {"text": ...}, and so does a JSON array of plain strings. A .csv file
    starts with a header. A .tsv file has no quoting (a quote is a quote); its first line is a
    header where every cell is an identifier, else the fields are "column_1", "column_2", ...

    `columns` names the fields of .csv and .tsv files without a header.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: unknown ending, empty file, not UTF-8, or a row that is no row.
    """
    names = [data_files] if isinstance(data_files, str | Path) else list(data_files)
    hub = [name for name in names if is_hub_name(name)]
    paths = [name for name in names if name not in hub]
    for path in list_files(paths) if paths or not hub else []:
        row = None
        for row in read_file(path, columns, txt_documents):
            yield row
        if row is None:
            raise ValueError(f"{path}: the file is empty; remove it from data_files")
    for name in hub:
        yield from read_hub_rows(name)


def list_files(data_files: str | list[str]) -> list[Path]:
    """Resolve files, folders (all known endings below them, sorted) and globs to file paths.

    A glob means its files, or its folders where it matches no file. A folder written by
    `datasets.save_to_disk` stands for itself. Of other folders hidden files are left out, and
    files with an unknown ending are named in a warning.

    Raises:
        FileNotFoundError: nothing is there; for data/generated, with the command that makes it.
        ValueError: unknown ending, a folder without data, or the same file twice.
    """
    names = [data_files] if isinstance(data_files, str | Path) else data_files
    found = [path for name in names for path in find_files(str(name))]
    for number, path in enumerate(found):
        if not path.is_dir() and (ending := find_ending(path)) not in KNOWN_ENDINGS:
            known = f"known endings: {ENDINGS_SHOWN}. Rename the file to what it holds"
            raise ValueError(f"{path}: unknown ending {ending!r}; {known}, or convert it")
        if path in found[:number]:
            raise ValueError(f"{path}: named twice in data_files; name it once")
    if not found:
        raise ValueError(f"data_files={data_files!r} names no file")
    return found


def find_files(name: str) -> list[Path]:
    path = Path(name)
    is_saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    if path.is_file() or is_saved:
        return [path]
    is_made = "data/generated" in path.absolute().as_posix()
    if path.is_dir() and (any(path.iterdir()) or not is_made):
        return list_folder(path)
    matches = [] if path.is_dir() else sorted(glob.glob(name, recursive=True))
    if matches:
        files = [match for match in matches if Path(match).is_file()]
        return [path for match in files or matches for path in find_files(match)]
    hint = "; make it with: python data/generate.py" if is_made else ""
    raise FileNotFoundError(f"{name}: no such file, folder or glob{hint}")


def list_folder(folder: Path) -> list[Path]:
    """List the data files below `folder`, sorted. Raises ValueError where there is none."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    visible = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    ignored = [str(path) for path in visible if find_ending(path) not in KNOWN_ENDINGS]
    if len(ignored) == len(visible):
        raise ValueError(f"{folder}: no data file in this folder; known endings: {ENDINGS_SHOWN}")
    if ignored:
        logger.warning("%s: ignored for their endings: %s", folder, ", ".join(ignored))
    return [folder / path for path in visible if str(path) not in ignored]


def find_ending(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_file(path: Path, columns: list[str] | None, txt_documents: str) -> Iterator[Row]:
    ending = find_ending(path)
    if path.is_dir():
        return read_saved_dataset(path)
    if ending in TEXT_ENDINGS:
        return read_text(path, txt_documents if ending == ".txt" else "line")
    if ending in (".csv", ".tsv"):
        return read_table(path, ending, columns)
    return read_parquet(path) if ending == ".parquet" else read_json(path)


def read_text(path: Path, txt_documents: str) -> Iterator[Row]:
    lines, start, size = [], 1, 0
    for number, line in read_lines(path):
        ends = txt_documents == "paragraph" and not line.strip()
        if lines and (ends or txt_documents == "line" or size >= LARGEST_DOCUMENT):
            yield Row(f"{path}:{start}", {"text": "".join(lines)})
            lines, size = [], 0
        if not ends:
            start = start if lines else number
            # The last newline belongs to a file, but not to a sentence.
            lines.append(line.removesuffix("\n") if txt_documents == "line" else line)
            size += len(line)
    if lines:
        yield Row(f"{path}:{start}", {"text": "".join(lines)})


def read_json(path: Path) -> Iterator[Row]:
    lines = read_lines(path)
    if find_ending(path) == ".json":
        lines = [(1, "".join(line for _, line in lines))]
    return (row for number, text in lines for row in parse_json(path, text, number))


def parse_json(path: Path, text: str, line: int) -> Iterator[Row]:
    """An array of objects (or of strings), or objects one after the other (JSON lines)."""
    gap = re.compile(r"[\s,]*")
    position = gap.match(text).end()
    is_array = text[position : position + 1] == "["
    position, counted = gap.match(text, position + is_array).end(), 0
    while position < len(text) and text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        value, position = decode_json(path, text, position, line)
        yield make_row(f"{path}:{line}", value)
        position = gap.match(text, position).end()
    if text[position:].strip() != "]" * is_array:
        line += text.count("\n", counted, position)
        raise ValueError(f"{path}:{line}: an array must end with ']', and the file with it")


def decode_json(path: Path, text: str, position: int, line: int) -> tuple[Any, int]:
    """Decode the JSON value at `position` of `text`, which is in line number `line`."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, position)
        # Half of a character, as cut-off emoji leave it, could not be tokenized or written.
        if re.search(r"\\u[dD]", text[position:end]):
            json.dumps(value, ensure_ascii=False).encode()
        return value, end
    except json.JSONDecodeError as error:
        line += text.count("\n", position, error.pos)
        around = text[max(0, error.pos - 30) : error.pos + 30].replace("\n", "\\n")
        message = f"malformed JSON at column {error.colno}: {error.msg}; around it: {around}"
    except UnicodeEncodeError as error:
        message = f"half of a surrogate pair; mend the text ({error})"
    raise ValueError(f"{path}:{line}: {message}")


def make_row(source: str, value: Any) -> Row:
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        raise ValueError(f'{source}: a row must be an object {{"text": ...}}, not {shorten(value)}')
    return Row(source, value)


def read_table(path: Path, ending: str, names: list[str] | None) -> Iterator[Row]:
    for number, cells in read_cells(path, ending):
        if names is None and any(cells):
            names = [cell.strip() for cell in cells]
            if ending == ".csv" or all(name.isidentifier() for name in names if name):
                continue
            names = [f"column_{position}" for position in range(1, len(cells) + 1)]
        if any(cells):
            yield make_table_row(f"{path}:{number}", names, cells)


def read_cells(path: Path, ending: str) -> Iterator[tuple[int, list[str]]]:
    number, lines = 1, read_lines(path)
    if ending == ".tsv":
        yield from ((number, line.rstrip("\n").split("\t")) for number, line in lines)
        return
    # The library's limit of 131,072 characters a cell is shorter than many documents.
    csv.field_size_limit(1 << 30)
    reader = csv.reader((line for _, line in lines), strict=True)
    try:
        for cells in reader:
            yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{number}: malformed row: {error}") from None


def make_table_row(source: str, names: list[str], cells: list[str]) -> Row:
    pairs = list(zip(names, cells, strict=False))
    # Spreadsheets leave columns without a name, left out here as long as they are empty.
    named = [(name, cell) for name, cell in pairs if name or cell]
    if len(cells) != len(names) or "" in dict(named) or len(dict(named)) < len(named):
        raise ValueError(
            f"{source}: {len(cells)} cells {shorten(cells)} do not fit the {len(names)} columns "
            f"{names}. Name each column once, and quote cells that hold the delimiter"
        )
    return Row(source, dict(named))


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with "\\n") of a UTF-8 file, without BOM and carriage returns."""
    try:
        with open_file(path) as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text[:-2] + "\n" if text.endswith("\r\n") else text
    except UnicodeDecodeError as error:
        utf16 = number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff")
        likely = "UTF-16" if utf16 else "WINDOWS-1252 (Western) or GB18030 (Chinese)"
        raise ValueError(
            f"{path}:{number}: not UTF-8 (byte {error.object[error.start]:#04x}). Convert a copy: "
            f"iconv -f ENCODING -t utf-8 {path.name} > copy; ENCODING is perhaps {likely}"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: broken gzip file ({error}); fetch it again") from None


def open_file(path: Path) -> BinaryIO:
    return (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb")


def read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    with open_file(path) as file:
        try:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000)
            values = (value for batch in batches for value in batch.to_pylist())
            yield from (Row(f"{path}:{number}", value) for number, value in enumerate(values, 1))
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: not a readable parquet file ({error})") from None


def read_saved_dataset(path: Path) -> Iterator[Row]:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, dict):
        raise ValueError(f"{path}: holds the splits {list(loaded)}; name one, {path}/<split>")
    yield from (Row(f"{path}:{number}", value) for number, value in enumerate(loaded, 1))


def is_hub_name(name: str) -> bool:
    """True for "user/name[:config[:split]]" that is neither a path nor looks like one."""
    name = str(name)
    is_known = Path(name.split("/")[0]).exists() or find_ending(Path(name)) in KNOWN_ENDINGS
    pattern = r"(?!data/)[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+){0,2}"
    return not is_known and re.fullmatch(pattern, name) is not None


def read_hub_rows(name: str) -> Iterator[Row]:
    """Stream a data set of the Hugging Face Hub (network needed); the split is "train"."""
    import datasets

    repository, config, split = (name.split(":") + [None, None])[:3]
    try:
        loaded = datasets.load_dataset(repository, config, split=split or "train", streaming=True)
    except Exception as error:
        message = f"{name}: no such file, nor does the Hub load it (needs the network)"
        raise FileNotFoundError(f"{message}: {error}") from error
    yield from (Row(f"{name}:{number}", value) for number, value in enumerate(loaded, 1))


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
    long = sum(map(len, documents)) * validation_share / 5
    for document in documents:
        cut = len(document) * (hash_share(document, seed) >= validation_share)
        if len(document) > long:
            # At the end of a line, or else of a word, where one is near.
            target = round(len(document) * (1 - validation_share))
            near = target - int(len(document) * validation_share / 2)
            cuts = [document.rfind(mark, near, target) + 1 for mark in ("\n", " ")]
            cut = next(filter(None, cuts), target)
        train += [document[:cut]] if document[:cut].strip() else []
        validation += [document[cut:]] if document[cut:].strip() else []
    check_split(train, validation, validation_share)
    return train, validation


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


def shorten(value: Any, length: int = 80) -> str:
    """Show a value in a message, cut to `length` characters."""
    shown = repr(value)
    return shown if len(shown) <= length else shown[: length - 3] + "..."
