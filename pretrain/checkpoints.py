"""Checkpoints that are whole or not there, and saved files that are what was trained.

Every stage trains through `train_or_resume` and saves through `save_model`:

- a checkpoint counts when `complete.json` stands in it. That is written last, when every process
  has written its part, the files are on the disk and the weights in them equal the live ones.
- an older checkpoint goes only after that, so that a killed run always has one to go on from.
- a final output is written beside its place, compared with the live weights, and moved.

With several machines, `output_dir` has to be on a file system that they share.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors import safe_open
from transformers import Trainer, TrainerCallback
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import stages
from pretrain.dry_run import DryRun


def train_or_resume(trainer: Trainer, run: stages.Run) -> None:
    """Train, from the run's checkpoint where there is one; a dry run ends at the first step.

    Raises:
        ValueError: the checkpoint was written by another stage of ZeRO; DeepSpeed is not there
            although it was asked for; or no step was taken.
        RuntimeError: saved weights differ from the live ones.
    """
    wanted = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if wanted and not trainer.is_deepspeed_enabled:
        raise ValueError(
            "DeepSpeed was asked for, and accelerate left it out, as it does where "
            "ACCELERATE_USE_CPU=true or `use_cpu: true` in its file: without it, DS_ACCELERATOR=cpu"
        )
    if run.checkpoint:
        fit_sharding(run.checkpoint, trainer)
    if run.scratch is not None:
        trainer.add_callback(DryRun(trainer, run))
    trainer.add_callback(WholeCheckpoints(trainer, run.checkpoint))
    trainer.train(resume_from_checkpoint=run.checkpoint)
    if trainer.state.global_step == 0:  # transformers says so in a warning, and is content
        args = trainer.args
        raise ValueError(
            f"no step was taken (max_steps {args.max_steps}, num_train_epochs "
            f"{args.num_train_epochs:g}): the model is as it was. With dataloader_drop_last the "
            f"data has to fill a batch: {len(trainer.train_dataset):,} rows, "
            f"{args.train_batch_size} x {args.world_size} a batch."
        )


def save_model(trainer: Trainer, directory: str | os.PathLike | None = None) -> None:
    """`trainer.save_model`, whole or not at all: every process has to call it.

    Args:
        directory: where to; None is the trainer's `output_dir`.

    Raises:
        RuntimeError: the files do not hold the live weights.
    """
    directory = Path(directory or trainer.args.output_dir)
    beside = directory / stages.BESIDE
    trainer.save_model(str(beside))
    check_saved_weights(trainer.model, beside)
    if trainer.args.should_save:
        move_into_place(beside, directory)
    stages.wait_for_all_processes()
    unset_hf_deepspeed_config()  # what is loaded from here on is no part of ZeRO-3's shards


def move_into_place(beside: Path, directory: Path) -> None:
    """Move what was written `beside` into `directory`, over what an earlier run left there."""
    sync_to_disk(beside)
    written = {path.name for path in beside.iterdir()}
    for old in directory.glob("*.safetensors*"):
        if old.name not in written:  # another number of shards
            old.unlink()
    for path in beside.iterdir():
        target = directory / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    beside.rmdir()


class WholeCheckpoints(TrainerCallback):
    """Check each checkpoint, mark it as whole, then let older ones go.

    It takes `save_total_limit` over from transformers, which removes the old checkpoint before the
    other processes have written their part of the new one. The best one, for
    `load_best_model_at_end`, is kept beside the newest.

    Args:
        trainer: whose checkpoints they are.
        checkpoint: where the run goes on from.

    Raises:
        ValueError: `save_only_model`, with which no run goes on as it was.
    """

    def __init__(self, trainer: Trainer, checkpoint: str | None):
        if trainer.args.save_only_model:
            raise ValueError(
                "save_only_model: the optimizer's states would be missing in the checkpoints, and "
                "an interrupted run would go on with new ones; set it to false"
            )
        self.trainer = trainer
        self.limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
        self.has_ended = checkpoint is not None and ended_early(checkpoint)

    def on_train_begin(self, args, state, control, **kwargs):
        """Take no step behind the last one: transformers would take one more."""
        if self.has_ended or state.global_step >= state.max_steps:
            self.trainer.get_batch_samples = _get_no_batches

    def on_save(self, args, state, control, model=None, **kwargs):
        """Compare, wait for the disk and the other processes, mark, tidy up."""
        path = Path(args.output_dir, f"checkpoint-{state.global_step}")
        check_saved_weights(model, path)
        stages.wait_for_all_processes()  # all of them have written their part
        if args.local_process_index == 0:
            sync_to_disk(path)
        stages.wait_for_all_processes()
        if args.should_save:
            files = (file for file in sorted(path.rglob("*")) if file.is_file())
            whole = {
                "step": state.global_step,
                "processes": args.world_size,
                "zero_stage": zero_stage(self.trainer),
                "files": {str(file.relative_to(path)): file.stat().st_size for file in files},
            }
            stages.write_json(path / stages.WHOLE, whole)
            _sync(path)
            self._rotate(Path(args.output_dir), state.best_model_checkpoint)

    def _rotate(self, directory: Path, best: str | None) -> None:
        older = stages.list_checkpoints(directory)[: -self.limit] if self.limit else []
        for checkpoint in older:
            if best is None or checkpoint.resolve() != Path(best).resolve():
                stages.remove_checkpoint(checkpoint)


def _get_no_batches(*args, **kwargs):
    """In place of `Trainer.get_batch_samples`, where all batches have been trained on."""
    return [], None


def ended_early(checkpoint: str | os.PathLike) -> bool:
    """Whether a callback (early stopping, a budget) ended training at this checkpoint."""
    state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop")) and state["global_step"] < state["max_steps"]


def zero_stage(trainer: Trainer) -> int:
    """The ZeRO stage that the trainer runs with, 0 without DeepSpeed."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    return plugin.zero_stage if plugin else 0


def fit_sharding(checkpoint: str | os.PathLike, trainer: Trainer) -> None:
    """Let a checkpoint of another number of processes be loaded, in all processes.

    Without ZeRO every process holds the optimizer's states whole, and any number can go on. ZeRO's
    are cut in as many pieces as there were processes: they are put together once, beside them, in
    DeepSpeed's universal form (Lian et al. 2024), which any number of processes can read.

    Raises:
        ValueError: the checkpoint was written by another stage of ZeRO, or without it; transformers
            would go on without the optimizer's states, and without a word.
    """
    written = stages.read_json(Path(checkpoint, stages.WHOLE))
    stage, now = zero_stage(trainer), trainer.args.world_size
    if written["zero_stage"] != stage:
        raise ValueError(
            f"{checkpoint} was written with ZeRO stage {written['zero_stage']}, this is stage "
            f"{stage} (0: no ZeRO). Its optimizer states only fit the former: start it as before, "
            "or start anew from its weights with --model_name_or_path and another --output_dir."
        )
    if stage == 0 or written["processes"] == now:
        return
    if stages.is_main_process():
        print(f"{checkpoint}: from {written['processes']} processes to {now}")
        make_universal(Path(checkpoint))
    stages.wait_for_all_processes()
    settings = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    settings["checkpoint"] = settings.get("checkpoint", {}) | {"load_universal": True}
    if stage == 3:
        trainer.add_callback(MendZero3(trainer, Path(checkpoint)))


class MendZero3(TrainerCallback):
    """What DeepSpeed 0.19 gets wrong where ZeRO-3 reads a universal checkpoint.

    It gives every group of parameters the first one's hyperparameters (weight decay, for one), and
    all parts of the optimizer one and the same counter of steps, which each of them advances.

    Args:
        trainer: whose optimizer it is.
        checkpoint: where the universal one lies.
    """

    def __init__(self, trainer: Trainer, checkpoint: Path):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        """The checkpoint has been read: put right what it holds."""
        optimizer = self.trainer.model_wrapped.optimizer.optimizer
        (path,) = self.checkpoint.glob("global_step*_universal/zero/optimizer_state.pt")
        saved = torch.load(path, map_location="cpu", weights_only=False)  # this run's own file
        for group, right in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in right.items() if key != "params"})
        for part in optimizer.state.values():
            if torch.is_tensor(part["step"]):
                part["step"] = part["step"].clone()


def make_universal(checkpoint: Path) -> None:
    """Put ZeRO's pieces together, as `global_step*_universal`, and leave them as they are.

    Made in a folder of its own and moved when it is on the disk, `latest_universal` last: without
    that file there is nothing to read.

    Raises:
        RuntimeError: DeepSpeed's converter failed; the message is its own.
    """
    if (checkpoint / "latest_universal").is_file():
        return
    pieces = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    made, name = checkpoint / "converting", f"{pieces.name}_universal"
    for old in (made, checkpoint / name):
        shutil.rmtree(old, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(pieces), "--output_folder", str(made / name)]
    command += ["--inject_missing_state"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{checkpoint} could not be converted:\n{done.stderr[-2000:]}")
    sync_to_disk(made)
    (made / name).replace(checkpoint / name)
    _sync(checkpoint)
    (made / "latest_universal").replace(checkpoint / "latest_universal")
    made.rmdir()
    _sync(checkpoint)


def check_saved_weights(model: Any, directory: str | os.PathLike) -> None:
    """Compare the safetensors files in a directory with the model in memory, bit by bit.

    Every process has to call it: ZeRO-3's parameters are gathered, one at a time. Of a PEFT model
    the adapter is compared.

    Raises:
        RuntimeError: a weight is missing, unknown or different (in the main process).
    """
    saved = {}
    if stages.is_main_process():
        for path in sorted(Path(directory).glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            saved |= {name: file for name in file.keys()}
    wrong, found, live = [], set(), dict(_live_weights(model))
    for name, tensor in live.items():
        with _gathered(tensor):
            if name in saved:
                found.add(id(tensor))
                stored = saved[name].get_tensor(name)
                if not torch.equal(stored, tensor.detach().cpu().to(stored.dtype)):
                    wrong.append(f"{name} differs")
    if not stages.is_main_process():
        return
    # Of tied weights one is in the file, under any of their names.
    wrong += [f"{name} is missing" for name, tensor in live.items() if id(tensor) not in found]
    wrong += [f"{name} is unknown" for name in saved if name not in live]
    if wrong:
        raise RuntimeError(
            f"{directory} does not hold the weights that are in memory: {', '.join(wrong[:5])} "
            f"({len(wrong)} of {len(live)} weights). Nothing was replaced by it. Look at the disk "
            "(full? faulty?); under ZeRO-3 set stage3_gather_16bit_weights_on_model_save."
        )


def _live_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What is expected in the files, by name: the tensors themselves, under ZeRO-3 placeholders."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    expected = dict(model.named_parameters(remove_duplicate=False))
    persistent = model.state_dict().keys()
    expected |= {k: v for k, v in model.named_buffers() if k in persistent}
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        expected = get_peft_model_state_dict(model, state_dict=expected)
    elif not any(hasattr(tensor, "ds_id") for tensor in expected.values()):
        expected = revert_weight_conversion(model, expected)  # mixtral's experts, gpt_neox's head
    yield from expected.items()


def _gathered(tensor: torch.Tensor):
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])


def sync_to_disk(directory: Path) -> None:
    """Wait until all files of a directory are on the disk: a power failure must not empty them."""
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    windows = sys.platform == "win32"  # opens no directories, flushes what it may write; not run
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
