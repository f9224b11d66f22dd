"""Which files a name means: a file, a folder, a glob, a saved data set, or one of the Hub.

What a file holds is read off its ending; a second ending, .gz or .zst, says that it is compressed.
"""

import glob
import logging
import re
from pathlib import Path

TEXT_ENDINGS = (".txt", ".dev", ".devtest")
KNOWN_ENDINGS = (*TEXT_ENDINGS, ".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED_ENDINGS = (".gz", ".zst")
PACKED_MARKS = {  # how bytes begin that are no text
    b"PAR1\x15": ".parquet",
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PK\x03\x04": ".zip",
}
ENDINGS_SHOWN = " ".join(KNOWN_ENDINGS) + ", each also with .gz or .zst"

logger = logging.getLogger(__name__)


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
    seen = set()
    for path in found:
        if not path.is_dir() and (ending := find_ending(path)) not in KNOWN_ENDINGS:
            raise ValueError(
                f"{path}: unknown ending {ending!r}; known endings: {ENDINGS_SHOWN}. Rename the "
                f"file to what it holds (it looks like {guess_ending(path)}), or convert it"
            )
        if path in seen:
            raise ValueError(f"{path}: named twice in data_files; name it once")
        seen.add(path)
    if not found:
        raise ValueError(f"data_files={data_files!r} names no file")
    return found


def find_files(name: str) -> list[Path]:
    """The files of one name, whatever their endings. Raises as `list_files`."""
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
    ignored = {path for path in visible if find_ending(path) not in KNOWN_ENDINGS}
    if len(ignored) == len(visible):
        raise ValueError(f"{folder}: no data file in this folder; known endings: {ENDINGS_SHOWN}")
    if ignored:
        named = ", ".join(str(path) for path in visible if path in ignored)
        logger.warning("%s: ignored for their endings: %s", folder, named)
    return [folder / path for path in visible if path not in ignored]


def find_ending(path: Path) -> str:
    """The ending that says what a file holds: ".jsonl" of X.JSONL.zst."""
    path = Path(path.name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED_ENDINGS else path.suffix


def guess_ending(path: Path) -> str:
    """The ending that the beginning of a file suggests."""
    with open(path, "rb") as file:
        start = file.read(4096).lstrip()
    text = {b"{": ".jsonl", b"[": ".json"}.get(start[:1])
    return find_packed(start) or text or (".tsv" if b"\t" in start.split(b"\n")[0] else ".txt")


def find_packed(start: bytes) -> str | None:
    """The ending of parquet or of compressed bytes that begin with `start`; None for others."""
    return next((end for mark, end in PACKED_MARKS.items() if start.startswith(mark)), None)


def is_hub_name(name: str) -> bool:
    """True for "user/name[:config[:split]]" that is neither a path nor looks like one."""
    name = str(name)
    is_known = Path(name.split("/")[0]).exists() or find_ending(Path(name)) in KNOWN_ENDINGS
    pattern = r"(?!data/)[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+){0,2}"
    return not is_known and re.fullmatch(pattern, name) is not None
