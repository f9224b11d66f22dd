"""Choose a recipe, batch sizes and pretraining minutes for this machine; print the command.

    python scripts/auto.py --minutes 20
    bash scripts/quickstart.sh --auto --minutes 20      # the same, and runs it

What was chosen, and why, goes to stderr; the command alone to stdout. The dtype and the attention
are chosen by every stage itself (pretrain/hardware.py).
"""

import argparse
import math
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import yaml

import stages

# Of configs/tiny, from the run.json files of two machines with 2 cores: at REFERENCE_PEAK (matrix
# products, FLOP/s, in bf16) 295 s of pretraining and 325 s of all other stages, at 0.33 of it (in
# fp32) 710 s and 582 s. So: what faster products would not shorten, what they take at the peak.
REFERENCE_PEAK = 1.0e12
PRETRAINING_S = (91, 204)
OTHER_STAGES_S = (198, 127)
# The bytes that each stage took at its peak.
PEAKS = {"sft": 3.29e9, "reward": 2.59e9, "dpo": 2.73e9, "ppo": 3.46e9, "grpo": 4.92e9}
LIBRARIES = 0.8e9  # of a peak: stays whatever the batch is
SHARE = 0.6  # of the memory, at most; and of what is free all but KEPT_FREE
KEPT_FREE = 1e9
HARD_SHARE = 0.85  # an allocation beyond it fails, instead of pushing all else into swap
LEAST_PRETRAINING = 2  # minutes
AMPLE = 1.5  # times what the recipe's own steps take: then they are enough, its text is small
SMALL = {"memory": 16e9, "gpu": 8e9, "cores": 8, "minutes": 120}  # what configs/small asks for


class Machine(NamedTuple):
    """What there is: bytes, FLOP/s of matrix products in the dtype that training will use."""

    cores: int
    memory: int
    free: int
    device: str
    gpu_memory: int
    dtype: str
    peak: float


class Choice(NamedTuple):
    """A recipe, what is set differently in it, and the reasons."""

    recipe: str
    settings: list[str]
    reasons: list[str]


def main(args: argparse.Namespace) -> None:
    """Look at the machine, choose, say why, print the command."""
    machine = look()
    choice = choose(machine, args.minutes, args.network)
    for reason in choice.reasons:
        print(f"  {reason}", file=sys.stderr)
    print(" ".join(make_command(choice, machine, shutil.which("prlimit") is not None)))


def look() -> Machine:
    """This machine."""
    import torch

    from pretrain.costs import peak_flops
    from pretrain.hardware import (
        measure_free_memory,
        measure_host_memory,
        quiet_logs,
        training_defaults,
    )

    quiet_logs()
    defaults = training_defaults()
    gpu = torch.cuda.is_available()
    device = "cpu" if defaults["use_cpu"] else "cuda" if gpu else "mps"
    dtype = "bf16" if defaults["bf16"] else "fp16" if defaults["fp16"] else "fp32"
    computed = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    return Machine(
        cores=os.cpu_count() or 1,
        memory=measure_host_memory(),
        free=measure_free_memory(),
        device=device,
        gpu_memory=torch.cuda.get_device_properties(0).total_memory if gpu else 0,
        dtype=dtype,
        peak=peak_flops(torch.device(device), computed),
    )


def choose(machine: Machine, minutes: float, network: bool = False) -> Choice:
    """What fits the machine and the time.

    Raises:
        ValueError: no time.
    """
    if not 0 < minutes < math.inf:
        raise ValueError(f"minutes is {minutes}: give a positive number")
    ceiling = max(min(SHARE * machine.memory, machine.free - KEPT_FREE), KEPT_FREE)
    whole, others = (
        (fixed + products * REFERENCE_PEAK / machine.peak) / 60
        for fixed, products in (PRETRAINING_S, OTHER_STAGES_S)
    )
    reasons = [
        f"machine: {machine.cores} cores, {machine.memory / 1e9:.1f} GB of memory "
        f"({machine.free / 1e9:.1f} free), {machine.device}, {machine.dtype} at "
        f"{machine.peak / 1e12:.2f} TFLOP/s",
        f"ceiling: {ceiling / 1e9:.1f} GB, so that other programs stay usable",
    ]
    if network and minutes >= SMALL["minutes"] and is_large(machine):
        reasons.append(f"recipe: small, with public data; all of {minutes:g} minutes are enough")
        return Choice("small", [f"pretrain.minutes={minutes / 2:g}"], reasons)
    if minutes - others < LEAST_PRETRAINING:
        reasons.append(
            f"recipe: smoke, which shows that all works and learns little: on this machine tiny's "
            f"other stages alone take about {others:.0f} of {minutes:g} minutes"
        )
        return Choice("smoke", [], reasons)
    pretraining, settings = round(minutes - others, 1), []
    if pretraining >= AMPLE * whole:
        reasons.append(f"recipe: tiny as it is; about {others + whole:.0f} of {minutes:g} minutes")
    else:
        reasons.append(
            f"recipe: tiny; about {others:.0f} minutes for its other stages, and so "
            f"{pretraining:g} of {minutes:g} for pretraining"
        )
        settings.append(f"pretrain.minutes={pretraining:g}")
    for stage, peak in PEAKS.items():
        parts = count_parts(peak, ceiling)
        if parts > 1:
            settings += cut_batch(stage, parts)
            reasons.append(
                f"{stage}: its batch in {parts} parts, for at once it took {peak / 1e9:.1f} GB"
            )
    return Choice("tiny", settings, reasons)


def cut_batch(stage: str, parts: int) -> list[str]:
    """The settings that cut a stage's batch, and leave what one step learns from as it is."""
    path = Path(__file__).parents[1] / f"configs/tiny/{stage}.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    sizes = {
        "per_device_train_batch_size": config["per_device_train_batch_size"] // parts,
        "gradient_accumulation_steps": config.get("gradient_accumulation_steps", 1) * parts,
    }
    if "steps_per_generation" in config:  # of a rollout, in micro-batches
        sizes["steps_per_generation"] = config["steps_per_generation"] * parts
    return [f"{stage}.{key}={value}" for key, value in sizes.items()]


def is_large(machine: Machine) -> bool:
    """Whether configs/small is for this machine."""
    if machine.device == "cuda":
        return machine.gpu_memory >= SMALL["gpu"]
    return machine.cores >= SMALL["cores"] and machine.memory >= SMALL["memory"]


def count_parts(peak: float, ceiling: float) -> int:
    """Into how many parts (1, 2, 4, 8) a batch is cut so that its stage stays below the ceiling."""
    for parts in (1, 2, 4):
        if LIBRARIES + (peak - LIBRARIES) / parts <= ceiling:
            return parts
    return 8


def make_command(choice: Choice, machine: Machine, limits: bool) -> list[str]:
    """The words of the command; `limits`: whether there is a `prlimit` (Linux)."""
    ceiling = [f"prlimit --data={int(HARD_SHARE * machine.memory)}"] if limits else []
    settings = ["--set", *choice.settings] if choice.settings else []
    words = ["nice -n 10 python scripts/pipeline.py", f"configs/{choice.recipe}", *settings]
    return [*ceiling, *words]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=15, help="time for all stages together")
    parser.add_argument("--network", action="store_true", help="public data may be downloaded")
    with stages.plain_errors():
        main(parser.parse_args())
