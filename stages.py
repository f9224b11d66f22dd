"""The contract between the stages: their order, their arguments, and what each leaves on disk.

A stage reads directories that earlier stages wrote and writes one directory of its own:

    weights, config, tokenizer   what `from_pretrained` needs
    run.json                     how it was made; `"finished": true` is written last
    metrics.jsonl                one line a logging step
    eval.json                    held-out numbers with units, sample counts and 95 % intervals

Light imports only: every stage imports this module first.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Stage(NamedTuple):
    """One rung: the module that runs it, and whether it trains (and so takes a launcher)."""

    module: str
    trains: bool


STAGES: dict[str, Stage] = {
    "tokenizer": Stage("tokenizer.train", trains=False),
    "prepare": Stage("pretrain.prepare", trains=False),
    "pretrain": Stage("pretrain.train", trains=True),
    "sft": Stage("sft.train", trains=True),
    "reward": Stage("rlhf.train_reward", trains=True),
    "dpo": Stage("rlhf.train_dpo", trains=True),
    "ppo": Stage("rlhf.train_ppo", trains=True),
    "grpo": Stage("rlhf.train_grpo", trains=True),
}

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "deepspeed")
PACKAGES += ("peft", "trl", "bitsandbytes")
LAUNCHER_FLAGS = ("--local_rank", "--deepspeed")  # where a run runs, not what it trains
WEIGHTS = ("*.safetensors", "*.parquet")
HASHED_FILES = ("config.json", "tokenizer.json", "chat_template.jinja", "meta.json")


def parse_args(
    dataclass_types: Sequence[type], argv: Sequence[str] | None = None, defaults: dict | None = None
) -> tuple:
    """Parse `--config FILE.yaml` and `--key value` overrides into the given dataclasses.

    Args:
        dataclass_types: dataclasses that own the known keys; no two may share a key.
        argv: the words of the command line; None takes those of this process.
        defaults: what depends on the machine; a YAML or a flag overrides it.

    Raises:
        FileNotFoundError: the YAML does not exist.
        ValueError: a key or a flag that no dataclass has; the message names the nearest one.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL's trainers report each run otherwise
    warnings.filterwarnings("ignore", category=FutureWarning)  # of keys that TRL itself sets
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # misses an optional kernel, aloud
    from trl import TrlParser

    argv = [part for word in (sys.argv[1:] if argv is None else argv) for part in _split(word)]
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
    *parsed, from_file, from_flags = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
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


def _split(word: str) -> list[str]:
    """`--config=x` as two words: TrlParser recognises the flag only when it stands alone."""
    return word.split("=", 1) if word.startswith("--config=") else [word]


def _suggest(unknown: list[str], parser: Any) -> str:
    known = [action.dest for action in parser._actions]
    parts = []
    for word in unknown:
        name = word.lstrip("-").replace("-", "_")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        parts.append(f"'{name}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
    return ", ".join(parts)


def require_input(directory: str | os.PathLike, *files: str) -> Path:
    """Check that the stage which makes `directory` has finished and nobody touched its files.

    Args:
        directory: an earlier stage's output, or any directory that `from_pretrained` loads.
        files: names that must be there (a pattern such as "*.safetensors" counts).

    Returns:
        The directory. A Hub name (no such path, one slash) is passed through as it is.

    Raises:
        FileNotFoundError: the directory or a file is missing; the message has the command.
        ValueError: the stage was interrupted, or its tokenizer or template changed afterwards.
    """
    directory = Path(directory)
    if not directory.is_dir():
        if len(directory.parts) == 2 and directory.parts[0] != "output":
            return directory  # a name on the Hub
        raise FileNotFoundError(f"{directory} does not exist. {_command_for(directory)}")
    for pattern in files:
        if not any(directory.glob(pattern)):
            raise FileNotFoundError(f"{directory / pattern} is missing. {_command_for(directory)}")
    record = read_json(directory / "run.json")
    if record is None:
        return directory  # made by somebody else: any from_pretrained directory is welcome
    if not record["finished"]:
        raise FileNotFoundError(f"{directory} holds an unfinished run. {_command_for(directory)}")
    for name in ("tokenizer.json", "chat_template.jinja"):
        made, now = record["outputs"].get(name), hash_outputs(directory).get(name)
        if made != now:
            raise ValueError(
                f"{directory / name} is not the file that the stage wrote (sha256 {str(now)[:12]}, "
                f"run.json says {str(made)[:12]}). Restore it. {_command_for(directory)}"
            )
    return directory


def _command_for(directory: Path) -> str:
    if directory.name not in STAGES:
        return "Name a directory that holds a model, or a name on the Hub."
    recipe = directory.parent.name or "tiny"
    return (
        f"Make it with: python -m {STAGES[directory.name].module} "
        f"--config configs/{recipe}/{directory.name}.yaml"
    )


def require_same_tokenizer(*directories: str | os.PathLike) -> None:
    """Raise a ValueError where the directories' tokenizer files differ from the first one's."""
    first, *others = [Path(directory) for directory in directories]
    expected = hash_outputs(first).get("tokenizer.json")
    for other in others:
        found = hash_outputs(other).get("tokenizer.json")
        if expected and found and expected != found:
            raise ValueError(
                f"the tokenizer of {other} (sha256 {found[:12]}) is not the one of {first} "
                f"({expected[:12]}): their ids mean different text. {_command_for(other)}"
            )


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


def check_world_size(world_size: int) -> None:
    """Raise a ValueError where the launcher started another number of processes than this.

    Processes that do not know of one another (torchrun without `use_cpu` on a machine without GPUs)
    train copies of the same model and overwrite each other's files without a word.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != world_size:
        raise ValueError(
            f"the launcher started {launched} processes, the trainer sees {world_size}: they would "
            "overwrite each other. On CPUs start with ACCELERATE_USE_CPU=true, or --use_cpu true."
        )


@dataclasses.dataclass
class Run:
    """One run of one stage, from `start_run` to `finish`."""

    directory: Path
    record: dict[str, Any]
    checkpoint: str | None  # where to resume from; None starts at step 0

    def finish(self, evaluation: dict[str, dict] | None = None, **extra: Any) -> None:
        """Write eval.json and, last, run.json with `"finished": true` (main process only).

        `evaluation` is {metric: {"value", "low", "high", "n", "unit"}}, `extra` goes to run.json.
        """
        if not is_main_process():
            return
        if evaluation is not None:
            write_json(self.directory / "eval.json", evaluation)
        self.record |= extra
        seconds = time.time() - self.record["started_at"] + self.record.get("earlier_s", 0)
        self.record["wall_time_s"] = round(seconds, 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.record["peak_memory_bytes"] = peak * (1 if sys.platform == "darwin" else 1024)
        self.record["outputs"] = hash_outputs(self.directory)
        self.record["finished"] = True
        write_json(self.directory / "run.json", self.record)
        print(f"{self.record['stage']}: done in {self.record['wall_time_s']} s -> {self.directory}")


def start_run(
    stage: str,
    output_dir: str | os.PathLike,
    arguments: Sequence[Any],
    inputs: Iterable[str | os.PathLike] = (),
    data_files: Iterable[str | os.PathLike] = (),
) -> Run:
    """Open run.json, and find the checkpoint of an interrupted run of the same command.

    An interrupted run with the same config, flags, inputs and data goes on from its last whole
    checkpoint; a run that differs in any of them starts over, and the old checkpoints go.
    `arguments` are the parsed dataclasses, `inputs` the directories of earlier stages.
    """
    directory = Path(output_dir)
    record = {
        "finished": False,
        "stage": stage,
        "command": _command_line(stage),
        "fingerprint": fingerprint(sys.argv[1:], inputs, data_files),
        "arguments": {k: v for one in arguments for k, v in _non_defaults(one).items()},
        "seed": next((one.seed for one in arguments if hasattr(one, "seed")), None),
        "versions": {"python": platform.python_version()} | _versions(),
        "git_commit": _git_commit(),
        "hardware": {"cpu": _cpu_name(), "cores": os.cpu_count(), "machine": platform.machine()},
        "started_at": time.time(),
    }
    before = read_json(directory / "run.json") or {}
    same = before.get("fingerprint") == record["fingerprint"] and not before["finished"]
    checkpoint = _last_checkpoint(directory) if same else None
    _wait_for_all_processes()  # everybody has read run.json before it is replaced
    if is_main_process():
        directory.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            _clear(directory)
        else:
            print(f"{stage}: an interrupted run goes on from {checkpoint}")
            record["resumed_from"] = [*before.get("resumed_from", []), checkpoint]
            saved_at = Path(checkpoint, "trainer_state.json").stat().st_mtime
            record["earlier_s"] = before.get("earlier_s", 0) + saved_at - before["started_at"]
        write_json(directory / "run.json", record)
    return Run(directory, record, checkpoint)


def is_unchanged(output_dir: str | os.PathLike, argv: Sequence[str]) -> bool:
    """Whether a finished run of the same arguments is there, on the same inputs and data."""
    record = read_json(Path(output_dir) / "run.json")
    if not record or not record["finished"]:
        return False
    made = record["fingerprint"]
    now = fingerprint(argv, made["inputs"], made["data"])
    return made == now and record["outputs"] == hash_outputs(output_dir)


def fingerprint(
    argv: Sequence[str],
    inputs: Iterable[str | os.PathLike],
    data_files: Iterable[str | os.PathLike],
) -> dict[str, Any]:
    """What decides a stage's result: its arguments, its config, and the bytes it reads."""
    words, config = _method_words(argv), None
    if "--config" in words:
        config = hash_file(words[words.index("--config") + 1])
    return {
        "arguments": words,
        "config_sha256": config,
        "inputs": {str(path): hash_outputs(path) for path in inputs},
        "data": {str(path): _hash_data(Path(path)) for path in data_files},
    }


def _hash_data(path: Path) -> str | None:
    if path.is_file():
        return hash_file(path)
    if path.is_dir():
        names = sorted(p for p in path.rglob("*") if p.is_file())
        return hashlib.sha256("".join(map(hash_file, names)).encode()).hexdigest()
    return None  # a pattern or a Hub name: its text is already among the arguments


def _method_words(argv: Sequence[str]) -> list[str]:
    """The command line without what the launcher adds (`--local_rank=0`, `--deepspeed FILE`)."""
    words, skip = [], False
    for word in [part for given in argv for part in _split(given)]:
        name = word.split("=", 1)[0]
        if skip or name in LAUNCHER_FLAGS:
            skip = not skip and "=" not in word
            continue
        words.append(word)
    return words


def _command_line(stage: str) -> str:
    return " ".join(["python -m", STAGES[stage].module, *_method_words(sys.argv[1:])])


def is_main_process() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def read_json(path: str | os.PathLike) -> dict | None:
    """The object in a JSON file, None where there is no file."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON beside the file and rename it into place: whole, or not at all."""
    beside = Path(f"{path}.partial")
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str)
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)


def _last_checkpoint(directory: Path) -> str | None:
    """The newest whole checkpoint: transformers writes trainer_state.json last."""
    whole = [path.parent for path in directory.glob("checkpoint-*/trainer_state.json")]
    newest = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    return str(newest) if newest else None


def _clear(directory: Path) -> None:
    """Remove what an earlier run left, so that no file of it is taken for this run's."""
    for path in directory.glob("checkpoint-*"):
        shutil.rmtree(path)
    for name in ("run.json", "eval.json", "metrics.jsonl", "answers.jsonl"):
        (directory / name).unlink(missing_ok=True)


def _wait_for_all_processes() -> None:
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


def _non_defaults(arguments: Any) -> dict[str, Any]:
    fields = [field for field in dataclasses.fields(arguments) if field.init]
    values = ((field, getattr(arguments, field.name, None)) for field in fields)
    return {f.name: v for f, v in values if v != f.default and v not in ([], {}, None)}


def _versions() -> dict[str, str]:
    installed = {one.name: one.version for one in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def _git_commit() -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
