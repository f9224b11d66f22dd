"""The contract between the stages: their order, and what each reads and leaves on disk.

A stage reads directories that earlier stages wrote and writes one directory of its own:

    weights, config, tokenizer   what `from_pretrained` needs
    run.json                     how it was made; `"finished": true` is written last
    metrics.jsonl                one line a logging step
    eval.json                    held-out numbers with units, sample counts and 95 % intervals

    python -m stages lineage output/tiny/grpo     # the road that led to a model

Light imports only: every stage imports this module first.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from commandline import is_dry_run
from commandline import parse_args as parse_args
from commandline import plain_errors as plain_errors
from lineage import check_road, trace
from provenance import (
    cpu_name,
    fingerprint,
    git_commit,
    goes_on,
    hash_outputs,
    installed_versions,
    measure_peak_memory,
    method_words,
    non_defaults,
    read_json,
    write_json,
)


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
# Beside the road, by commands of their own: the pipeline leaves them out.
BRANCHES = {"classifier": Stage("sft.train_classifier", True), "merge": Stage("sft.merge", False)}
# Who says how many processes were started, in the order of their authority.
PROCESS_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
PROCESS_COUNTS += ("SLURM_STEP_NUM_TASKS",)  # of this srun, not of the whole job
WHOLE = "complete.json"  # written last into a checkpoint; without it there is no checkpoint
# What a run may leave and the next one in its place not write: it would pass for the next one's.
LEFT_BY_A_RUN = ("run.json", "eval.json", "metrics.jsonl", "answers.jsonl", "texts.jsonl")
LEFT_BY_A_RUN += ("guards.jsonl", "curves.png", "margins.png")
BESIDE = "saving.partial"  # where an output is written before it is moved into place


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
    check_road(directory, record)
    return directory


def _command_for(directory: Path) -> str:
    if (directory / "adapter_config.json").is_file():
        return f"It is a LoRA adapter: merge it first, python -m sft.merge {directory} --output_dir"
    if directory.name not in STAGES | BRANCHES:
        return "Name a directory that holds a model, or a name on the Hub."
    recipe = directory.parent.name or "tiny"
    return (
        f"Make it with: python -m {(STAGES | BRANCHES)[directory.name].module} "
        f"--config configs/{recipe}/{directory.name}.yaml"
    )


def require_same_tokenizer(*directories: str | os.PathLike) -> None:
    """Raise a ValueError where tokenizer or template of a directory are not the first one's."""
    first, *others = [Path(directory) for directory in directories]
    harm = {
        "tokenizer.json": "their ids mean different text",
        "chat_template.jinja": "they write a conversation differently",
    }
    for name, why in harm.items():
        expected = hash_outputs(first).get(name)
        for other in others:
            found = hash_outputs(other).get(name)
            if expected and found and expected != found:
                raise ValueError(
                    f"{other / name} (sha256 {found[:12]}) is not the one of {first} "
                    f"({expected[:12]}): {why}. {_command_for(other)}"
                )


def check_world_size(world_size: int) -> None:
    """Raise a ValueError where the launcher was asked for another number of processes than this.

    Processes that do not know of one another (torchrun without `use_cpu` on a machine without GPUs,
    `srun` without a launcher) train copies of the same model and overwrite each other's files
    without a word; `accelerate launch --cpu --num_processes 2` and its MULTI_CPU start one process.
    """
    count = next((os.environ[name] for name in PROCESS_COUNTS if name in os.environ), None)
    if count is not None and int(count) != world_size:
        raise ValueError(
            f"the launcher started {count} processes, the trainer sees {world_size}: they would "
            "overwrite each other. On CPUs start with ACCELERATE_USE_CPU=true, or --use_cpu true."
        )
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if count is None and by_accelerate and "MASTER_ADDR" in os.environ:
        raise ValueError(
            "accelerate was asked for several processes and started one, as it does with --cpu, "
            "use_cpu and MULTI_CPU. On CPUs: ACCELERATE_USE_CPU=true accelerate launch "
            "--config_file configs/launch/cpu_2_processes.yaml"
        )


@dataclasses.dataclass
class Run:
    """One run of one stage, from `start_run` to `finish`."""

    directory: Path
    record: dict[str, Any]
    checkpoint: str | None  # where to resume from; None starts at step 0
    scratch: tempfile.TemporaryDirectory | None = None  # of a dry run: all that it writes

    def end_dry_run(self, **facts: Any) -> None:
        """End a dry run: print what was found out, remove what was written, and exit with 0.

        What trains ends in `pretrain.dry_run`, right before its first optimizer step.
        """
        assert self.scratch is not None, "not a dry run"
        if is_main_process():
            fingerprint = self.record["fingerprint"]
            reads = [*fingerprint["inputs"], *fingerprint["data"]]
            facts = {"reads": ", ".join(reads) or "nothing"} | facts
            print(f"\n{self.record['stage']}: dry run, nothing was written")
            print("\n".join(f"  {name.replace('_', ' '):18} {facts[name]}" for name in facts))
        self.scratch.cleanup()
        sys.exit(0)

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
        self.record["peak_memory_bytes"] = measure_peak_memory()
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
    checkpoint; a run that differs in any of them starts over, and the old checkpoints go. It may
    go on with other processes, as long as all of them together take the same batch a step.
    `arguments` are the parsed dataclasses, `inputs` the directories of earlier stages.

    Raises:
        FileNotFoundError: `--resume_from_checkpoint` names no whole checkpoint.
        ValueError: the interrupted run took another batch a step, or `output_dir` is an input.
    """
    directory, inputs = Path(output_dir), list(inputs)
    if directory.resolve() in (Path(one).resolve() for one in inputs):
        raise ValueError(f"output_dir={directory} is what the stage reads: name another directory")
    asked = next((a.resume_from_checkpoint for a in arguments if _trains(a)), None)
    if asked and not _is_in(asked, directory):
        inputs = [*inputs, asked]  # another run's: it decides the result
    record = {
        "finished": False,
        "stage": stage,
        "command": _command_line(stage),
        "fingerprint": fingerprint(sys.argv[1:], inputs, data_files),
        "lineage": trace(inputs),
        "arguments": {k: v for one in arguments for k, v in non_defaults(one).items()},
        "batch": next((_batch(one) for one in arguments if _trains(one)), None),
        "seed": next((one.seed for one in arguments if hasattr(one, "seed")), None),
        "versions": installed_versions(),
        "git_commit": git_commit(),
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "machine": platform.machine()},
        "started_at": time.time(),
    }
    if is_dry_run():
        return _rehearse(record, arguments)
    before = read_json(directory / "run.json") or {}
    checkpoint = _choose_checkpoint(directory, asked, goes_on(before, record))
    wait_for_all_processes()  # everybody has read run.json before it is replaced
    if is_main_process():
        directory.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            _say_what_is_lost(directory, before, record)
        _clear(directory, checkpoint)
        if checkpoint is not None:
            print(f"{stage}: an interrupted run goes on from {checkpoint}")
            record["resumed_from"] = [*before.get("resumed_from", []), checkpoint]
            saved_at = Path(checkpoint, WHOLE).stat().st_mtime
            earlier_s = saved_at - before.get("started_at", saved_at)
            record["earlier_s"] = before.get("earlier_s", 0) + max(earlier_s, 0)
        write_json(directory / "run.json", record)
    return Run(directory, record, checkpoint)


def _say_what_is_lost(directory: Path, before: dict[str, Any], record: dict[str, Any]) -> None:
    """Print why an interrupted run with checkpoints does not go on, and what is removed."""
    whole = list_checkpoints(directory)
    if not whole or not before or before["finished"]:
        return
    made, now = before["fingerprint"], record["fingerprint"]
    other = [name.removesuffix("_sha256") for name in now if made.get(name) != now[name]]
    print(
        f"{record['stage']}: {directory} held an interrupted run with other {', '.join(other)}: "
        f"this one starts over, {whole[-1].name} is removed"
    )


def _rehearse(record: dict[str, Any], arguments: Sequence[Any]) -> Run:
    """A run whose output goes to a temporary directory, removed at its end."""
    scratch = tempfile.TemporaryDirectory(prefix="dry_run_", ignore_cleanup_errors=True)
    for one in arguments:
        if hasattr(one, "output_dir"):
            one.output_dir = scratch.name
    return Run(Path(scratch.name), record, None, scratch)


def _trains(arguments: Any) -> bool:
    return hasattr(arguments, "gradient_accumulation_steps")


def _batch(arguments: Any) -> int:
    """Examples that all processes take in one optimizer step."""
    size = arguments.train_batch_size * arguments.gradient_accumulation_steps
    return size * arguments.world_size


def is_unchanged(output_dir: str | os.PathLike, argv: Sequence[str]) -> bool:
    """Whether a finished run of the same arguments is there, on the same inputs and data."""
    record = read_json(Path(output_dir) / "run.json")
    if not record or not record["finished"]:
        return False
    made = record["fingerprint"]
    now = fingerprint(argv, made["inputs"], made["data"])
    return made == now and record["outputs"] == hash_outputs(output_dir)


def _command_line(stage: str) -> str:
    return " ".join(["python -m", (STAGES | BRANCHES)[stage].module, *method_words(sys.argv[1:])])


def is_main_process() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def is_whole(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint was written to its end: every file of its list is there, in its size."""
    checkpoint = Path(checkpoint)
    written = read_json(checkpoint / WHOLE)
    if written is None:
        return False
    paths = ((checkpoint / name, size) for name, size in written["files"].items())
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def list_checkpoints(directory: str | os.PathLike) -> list[Path]:
    """The whole checkpoints of a run, the oldest first."""
    whole = [path for path in Path(directory).glob("checkpoint-*") if is_whole(path)]
    return sorted(whole, key=_step)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint; interrupted in between, what is left of it is none."""
    (checkpoint / WHOLE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _is_in(path: str, directory: Path) -> bool:
    return Path(path).parent.resolve() == directory.resolve()


def _choose_checkpoint(directory: Path, asked: str | None, same: bool) -> str | None:
    """Where a run goes on: where it was asked to, else at the newest of its own checkpoints."""
    whole = [str(path) for path in list_checkpoints(directory)]
    if same and whole and not (asked and _is_in(asked, directory)):
        return whole[-1]
    if asked and not is_whole(asked):
        raise FileNotFoundError(
            f"--resume_from_checkpoint {asked}: there is no whole checkpoint. {directory} has "
            f"{', '.join(whole) or 'none'}; without the flag a run goes on from its newest."
        )
    return asked


def _clear(directory: Path, checkpoint: str | None) -> None:
    """Remove what does not belong to the run that goes on from `checkpoint`.

    That is half-written checkpoints and those behind it, which the run will write again; and all
    that an earlier run left, where there is no checkpoint or it is another run's.
    """
    for path in list(directory.rglob(BESIDE)):
        shutil.rmtree(path)
    whole = list_checkpoints(directory)
    own = checkpoint is not None and _is_in(checkpoint, directory)
    for path in directory.glob("checkpoint-*"):
        if not (own and path in whole and _step(path) <= _step(Path(checkpoint))):
            remove_checkpoint(path)
    if not own:
        for name in LEFT_BY_A_RUN:
            (directory / name).unlink(missing_ok=True)
        shutil.rmtree(directory / "adapter", ignore_errors=True)


def wait_for_all_processes() -> None:
    """Return when every process of the run has come here."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


if __name__ == "__main__":
    from lineage import main

    with plain_errors():
        main(sys.argv[1:])
