"""What a run is made of: its words, its files by their hashes, the versions, the machine.

Light imports only: `stages` imports this module.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "deepspeed")
PACKAGES += ("peft", "trl", "bitsandbytes", "tiktoken")
LAUNCHER_FLAGS = ("--local_rank", "--deepspeed")  # where a run runs, not what it trains
LAUNCHER_FLAGS += ("--resume_from_checkpoint",)  # where it goes on; run.json says `resumed_from`
DIVISION_FLAGS = ("--per_device_train_batch_size", "--gradient_accumulation_steps")
WEIGHTS = ("*.safetensors", "*.parquet")
HASHED_FILES = ("config.json", "tokenizer.json", "chat_template.jinja", "meta.json")


def hash_outputs(directory: str | os.PathLike) -> dict[str, str]:
    """sha256 by file name of the weights, config, tokenizer, template and data in a directory."""
    directory = Path(directory)
    paths = [directory / name for name in HASHED_FILES]
    paths += sorted(path for pattern in WEIGHTS for path in directory.glob(pattern))
    return {path.name: hash_file(path) for path in paths if path.is_file()}


def hash_file(path: str | os.PathLike) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: str | os.PathLike) -> dict | None:
    """The object in a JSON file, None where there is no file."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON beside the file and rename it into place: whole, or not at all."""
    beside = Path(f"{path}.partial")
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str)
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())  # the name must not reach the disk before the bytes
    beside.replace(path)


def fingerprint(
    argv: Sequence[str],
    inputs: Iterable[str | os.PathLike],
    data_files: Iterable[str | os.PathLike],
) -> dict[str, Any]:
    """What decides a stage's result: its arguments, its config, and the bytes it reads."""
    words, config = method_words(argv), None
    if "--config" in words:
        config = hash_file(words[words.index("--config") + 1])
    return {
        "arguments": words,
        "config_sha256": config,
        "inputs": {str(path): hash_outputs(path) for path in inputs},
        "data": {str(path): hash_data(Path(path)) for path in data_files},
    }


def hash_data(path: Path) -> str | None:
    """sha256 of a file, or of a folder's files; None of a pattern or a name on the Hub."""
    if path.is_file():
        return hash_file(path)
    # Of a Hub name nothing is here; its text is already among the arguments.
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    names = sorted(p for p in found if p.is_file())
    return hashlib.sha256("".join(map(hash_file, names)).encode()).hexdigest() if names else None


def method_words(argv: Sequence[str], anywhere: bool = False) -> list[str]:
    """The command line without what the launcher adds (`--local_rank=0`, `--deepspeed FILE`).

    With `anywhere` also without what differs when the same run goes on with other processes: how
    the batch of a step is divided among them.
    """
    flags = LAUNCHER_FLAGS + (DIVISION_FLAGS if anywhere else ())
    words, skip = [], False
    for word in [part for given in argv for part in split_word(given)]:
        name = word.split("=", 1)[0]
        if skip or name in flags:
            skip = not skip and "=" not in word
            continue
        words.append(word)
    return words


def goes_on(before: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether `record` is of the same run as the interrupted one that wrote `before`.

    Raises:
        ValueError: it is, but for the examples a step, which would change what is learned.
    """

    def method(one: dict[str, Any]) -> dict[str, Any]:
        words = one["fingerprint"]["arguments"]
        return one["fingerprint"] | {"arguments": method_words(words, anywhere=True)}

    if not before or before["finished"] or method(before) != method(record):
        return False
    if before["batch"] != record["batch"]:
        if before["fingerprint"] != record["fingerprint"]:
            return False  # asked for: another batch is another run
        raise ValueError(
            f"the interrupted run took {before['batch']} examples a step, on as many processes as "
            f"there are now it would be {record['batch']}. Choose --per_device_train_batch_size "
            f"and --gradient_accumulation_steps so that it stays {before['batch']}, start as many "
            "processes as before, or give another --output_dir."
        )
    return True


def split_word(word: str) -> list[str]:
    """`--config=x` as two words: TrlParser recognises the flag only when it stands alone."""
    return word.split("=", 1) if word.startswith("--config=") else [word]


def non_defaults(arguments: Any) -> dict[str, Any]:
    """The fields of a dataclass that were set to something else than their defaults."""
    fields = [field for field in dataclasses.fields(arguments) if field.init]
    values = ((field, getattr(arguments, field.name, None)) for field in fields)
    return {f.name: v for f, v in values if v != f.default and v not in ([], {}, None)}


def installed_versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide a result."""
    installed = {one.name: one.version for one in importlib.metadata.distributions()}
    found = {name: installed[name] for name in PACKAGES if name in installed}
    return {"python": platform.python_version()} | found


def git_commit() -> str | None:
    """The commit of this checkout, None outside git."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def cpu_name() -> str:
    """The processor's own name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def measure_peak_memory() -> int:
    """Bytes of this process's highest resident memory.

    On Linux from /proc: `ru_maxrss` begins there with what the parent process had reached. Windows
    has no such module (not run here).
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
