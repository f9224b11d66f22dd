"""The lines of a file, whatever its compression, its encoding and its line ends.

Text is UTF-8, with or without a byte order mark. Any other encoding is named in the error and read
only where it was asked for: a wrong guess would put wrong letters into a model, silently.
"""

import codecs
import gzip
import io
import logging
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tokenizer.bad_rows import BadRows
from tokenizer.files import COMPRESSED_ENDINGS, find_packed

SAMPLE_BYTES = 1 << 16  # of the lines that are not ASCII; an encoding shows in far fewer
FEWEST_BYTES = 8  # outside of ASCII; below it any guess is a coin toss

logger = logging.getLogger(__name__)


def read_lines(
    path: Path, encoding: str | None = None, bad_rows: BadRows | None = None
) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with "\\n") of a file, without byte order mark and "\\r".

    Args:
        encoding: None for UTF-8, a name that Python knows, or "auto" for what the file looks like
            (charset-normalizer); what was chosen is said in a warning, with a line to check it by.
        bad_rows: where a line that is not UTF-8 is counted; None makes it an error.

    Raises ValueError for another encoding, with a guess, for UTF-8 where another encoding was
    named, for bytes that are no text, and for a broken compressed file.
    """
    if encoding == "auto":
        encoding = choose_encoding(path)
    try:
        with open_file(path) as file:
            _refuse_packed(path, file)
            if encoding is None or codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
                yield from _read_utf8(path, file, bad_rows)
            else:
                _refuse_utf8(path, encoding)
                yield from _read_encoded(path, file, encoding)
    except LookupError:
        raise ValueError(
            f"encoding={encoding!r} is none that Python knows; names are such as cp1252 (Western), "
            "gb18030 (Chinese), utf-16; or auto"
        ) from None
    except (EOFError, zlib.error, OSError) as error:
        if path.suffix.lower() not in (".gz", ".zst"):
            raise
        kind = "gzip" if path.suffix.lower() == ".gz" else "zstandard"
        raise ValueError(f"{path}: broken {kind} file ({error}); fetch it again") from None


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading bytes, decompressed."""
    ending = path.suffix.lower()
    if ending == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20)
    return (gzip.open if ending == ".gz" else open)(path, "rb")


def _refuse_packed(path: Path, file: BinaryIO) -> None:
    ending = find_packed(file.peek(8)[:8])
    if ending is not None:
        do = f"Rename it to {path.name}{ending}, or unpack it"
        if ending not in COMPRESSED_ENDINGS or path.suffix.lower() in COMPRESSED_ENDINGS:
            do = f"Unpack it, such as with unzip or gunzip, and read what is in it ({ending})"
        if ending == ".parquet":
            do = f"Rename it to {path.stem}.parquet"
        raise ValueError(f"{path}: no text: it holds the bytes of a {ending} file. {do}")


def _refuse_utf8(path: Path, encoding: str) -> None:
    """Most of UTF-8 is also gb18030 or cp1252: the wrong letters, and no error."""
    decoder, is_ascii = codecs.getincrementaldecoder("utf-8")(), True
    with open_file(path) as file:
        try:
            while piece := file.read(1 << 20):
                decoder.decode(piece)
                is_ascii = is_ascii and piece.isascii()
                if b"\0" in piece:  # as UTF-16 has it
                    return
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return
    if not is_ascii:
        raise ValueError(
            f"{path}: not {encoding}, which was asked for. It is UTF-8: leave --encoding out, or "
            "where the files have several encodings, pass --encoding auto"
        )


def _read_utf8(
    path: Path, file: BinaryIO, bad_rows: BadRows | None
) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, 1):
        try:
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
                if _is_wide(line):
                    bad_rows = None  # no broken row: a file in another encoding
                    raise UnicodeDecodeError("utf-8", line, max(0, line.find(b"\0")), 0, "")
            text = line.decode()
        except UnicodeDecodeError as error:
            message = f"{path}:{number}: not UTF-8 (byte {line[error.start]:#04x})"
            if bad_rows is None or not bad_rows.skips:
                raise ValueError(f"{message}. {_suggest_encoding(path, line)}") from None
            bad_rows.refuse(message)
            continue
        yield number, text[:-2] + "\n" if text.endswith("\r\n") else text


def _read_encoded(path: Path, file: BinaryIO, encoding: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(io.TextIOWrapper(file, encoding, newline="\n"), 1):
            yield number, line[:-2] + "\n" if line.endswith("\r\n") else line
    except UnicodeError as error:
        raise ValueError(
            f"{path}: not {encoding} behind line {number} ({error}). {_suggest_encoding(path)}"
        ) from None


def choose_encoding(path: Path) -> str | None:
    """What a file is written in: None for UTF-8, else the likeliest encoding, in a warning."""
    names, sample = guess_encodings(path)
    if not names:
        if names is None:
            return None
        raise ValueError(f"{path}: encoding=auto finds none. {_suggest_encoding(path)}")
    logger.warning("%s: read as %s: %r", path, names[0], _show(sample, names[0]))
    return names[0]


def guess_encodings(path: Path) -> tuple[list[str] | None, bytes]:
    """Encodings that fit a file, the likeliest first (None for UTF-8), and bytes to show them on.

    Looks at the lines that are not ASCII: in the others all encodings agree.
    """
    decoder, is_utf8 = codecs.getincrementaldecoder("utf-8")(), True
    lines, size = [], 0
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1 and _is_wide(line):
                sample = line + file.read(SAMPLE_BYTES)
                return _match_encodings(sample[: len(sample) // 4 * 4]), sample[:120]
            try:
                decoder.decode(line)
            except UnicodeDecodeError:
                is_utf8 = False
            if not line.isascii() and size < SAMPLE_BYTES:
                lines.append(line)
                size += len(line)
            if not is_utf8 and size >= SAMPLE_BYTES:
                break
    if is_utf8:
        return None, b""
    return _match_encodings(b"".join(lines)), lines[0]


def _is_wide(line: bytes) -> bool:
    """Whether a first line is of UTF-16 or UTF-32: their mark, or every other byte is a NUL."""
    has_mark = line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return has_mark or line.count(b"\0") > len(line) / 3


def _match_encodings(sample: bytes) -> list[str]:
    import charset_normalizer

    if sum(byte > 127 for byte in sample) < FEWEST_BYTES and b"\0" not in sample:
        return []
    matches = charset_normalizer.from_bytes(sample)
    names = [match.encoding.replace("_", "-") for match in matches]
    if b"\0" not in sample:  # which every line end of those has
        names = [name for name in names if not name.startswith("utf-")]
    letters = {char for char in str(matches.best()) if char.isalpha()}
    if "cp1252" in names and all("LATIN" in unicodedata.name(char, "") for char in letters):
        # A dozen one-byte encodings fit a Western text; this is what it nearly always is.
        names.insert(0, names.pop(names.index("cp1252")))
    return names


def _suggest_encoding(path: Path, line: bytes | None = None) -> str:
    names, sample = guess_encodings(path)
    convert = f"iconv -f {{}} -t utf-8 {path.name} > copy"
    if names is None:
        return "It is UTF-8: leave --encoding out"
    if not names:
        likely = "perhaps cp1252 (Western) or gb18030 (Chinese)"
        return f"Too little to tell the encoding, {likely}: {convert.format('ENCODING')}"
    shown = _show(line if line and b"\0" not in sample else sample, names[0])
    others = f" (or {', '.join(names[1:4])})" if len(names) > 1 else ""
    return (
        f"It looks like {names[0]}{others}, where this reads {shown!r}. If that is right, pass "
        f"--encoding {names[0]} to the stages that take it, or convert a copy: "
        f"{convert.format(names[0])}"
    )


def _show(line: bytes, encoding: str) -> str:
    """A line's first letter outside of ASCII, and what is around it."""
    text = line.decode(encoding, errors="replace").strip()
    place = next((index for index, char in enumerate(text) if not char.isascii()), 0)
    return text[max(0, place - 25) : place + 25]
