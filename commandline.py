"""The words of a command line: strict parsing, `--dry_run`, which every stage takes, plain errors.

Light imports only: `stages` imports this module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from provenance import split_word

DRY_RUN = "--dry_run"
# Set on import: what is loaded after this module is quiet about an optional kernel that is missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Every command runs in it: an error that our code raises for the user is shown without frames.

    So is the sentence in which transformers says that it found no such model: an OSError without a
    number. Anything else, a library's ValueError too, is a bug until somebody has looked, and
    keeps its traceback. Ctrl-C ends with the exit code that shells give it.
    """
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        if not _is_ours(error) and getattr(error, "errno", 0) is not None:
            raise
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def _is_ours(error: Exception) -> bool:
    """Whether a line of this repository raised the error."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    file = Path(trace.tb_frame.f_code.co_filename).resolve()
    root = Path(__file__).resolve().parent
    return file.is_relative_to(root) and "site-packages" not in file.relative_to(root).parts


def parse_args(
    dataclass_types: Sequence[type], argv: Sequence[str] | None = None, defaults: dict | None = None
) -> tuple:
    """Parse `--config FILE.yaml` and `--key value` overrides into the given dataclasses.

    `--dry_run` belongs to every stage and to no recipe: it is taken off here (see `is_dry_run`).

    Args:
        dataclass_types: dataclasses that own the known keys; no two may share a key.
        argv: the words of the command line; None takes those of this process.
        defaults: what depends on the machine; a YAML or a flag overrides it.

    Raises:
        FileNotFoundError: the YAML does not exist.
        ValueError: a key or a flag that no dataclass has; the message names the nearest one. A
            file that is no YAML, or a value that is refused.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL's trainers report each run otherwise
    warnings.filterwarnings("ignore", category=FutureWarning)  # of keys that TRL itself sets
    import yaml
    from trl import TrlParser

    words = sys.argv[1:] if argv is None else argv
    argv = take_dry_run([part for word in words for part in split_word(word)])[0]
    parser = TrlParser(dataclass_types, allow_abbrev=False)
    if defaults:
        known = {action.dest for action in parser._actions}
        parser.set_defaults_with_config(**{k: v for k, v in defaults.items() if k in known})
    if "--config" in argv:
        position = argv.index("--config") + 1
        if position == len(argv):
            raise ValueError("--config needs a file: --config configs/tiny/sft.yaml")
        if not Path(argv[position]).is_file():
            raise FileNotFoundError(
                f"--config {argv[position]}: no such file. The recipes are in configs/: "
                f"{', '.join(sorted(p.name for p in Path('configs').glob('*/')))}"
            )
    try:
        *parsed, from_file, from_flags = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    except (ValueError, yaml.YAMLError) as error:  # a value that TrainingArguments refuses, too
        where = argv[argv.index("--config") + 1] if "--config" in argv else "the command line"
        raise ValueError(f"{where}: {error}") from error
    for where, words in (("the config file", from_file), ("the command line", from_flags)):
        unknown = [word for word in words if word.startswith("--")] or words[:1]
        if unknown:
            raise ValueError(f"unknown key in {where}: {_suggest(unknown, parser)}")
    if any(getattr(one, "trust_remote_code", False) for one in parsed):
        raise ValueError("trust_remote_code is refused: models and data are loaded, never executed")
    for one in parsed:  # a single file needs no brackets in YAML
        for field in dataclasses.fields(one):
            if "list[str]" in str(field.type) and isinstance(getattr(one, field.name), str):
                setattr(one, field.name, [getattr(one, field.name)])
    return tuple(parsed)


def _suggest(unknown: list[str], parser: Any) -> str:
    known = [action.dest for action in parser._actions]
    parts = []
    for word in unknown:
        name = word.lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        parts.append(f"'{name}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
    return ", ".join(parts)


def is_dry_run() -> bool:
    """Whether this process was started with `--dry_run`: all but the first optimizer step."""
    return take_dry_run(sys.argv[1:])[1]


def take_dry_run(argv: Sequence[str]) -> tuple[list[str], bool]:
    """The words without `--dry_run [true|false]`, and whether it was asked for."""
    rest, asked, previous = [], False, ""
    for word in argv:
        name, _, value = word.partition("=")
        if name == DRY_RUN:
            asked = value.lower() != "false"
        elif previous == DRY_RUN and word.lower() in ("true", "false"):
            asked = word.lower() == "true"
        else:
            rest.append(word)
        previous = word
    return rest, asked
