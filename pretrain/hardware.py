"""What this machine can do, and the training defaults that follow from it.

Configs say what is trained and never name a dtype or a device: that is decided here, by
capability, and can still be overridden by a flag.
"""

import atexit
import ctypes
import importlib.util
import logging
import os
import shutil
import sys
import warnings

import psutil
import torch
from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available

import stages
from pretrain.attention import BLOCKWISE, PACKED


def training_defaults() -> dict:
    """Defaults of `TrainingArguments` for this machine; recipes and flags override them."""
    gpu = torch.cuda.is_available()
    return {
        "use_cpu": not gpu and not torch.backends.mps.is_available(),
        "bf16": supports_bf16(),
        "fp16": gpu and not supports_bf16(),  # Trainer scales the loss by itself then
        "gradient_checkpointing": False,
        "dataloader_pin_memory": gpu,
        "report_to": ["tensorboard"] if is_tensorboard_available() else [],
        "disable_tqdm": not sys.stderr.isatty(),
        "log_level_replica": "passive",  # else all processes but the first print warnings
        "logging_nan_inf_filter": False,  # it would replace a NaN loss by a number
        "save_total_limit": 1,
        "warmup_steps": 0.05,
    }


def supports_bf16() -> bool:
    """Whether bfloat16 is computed in hardware.

    Emulated bf16 is a trap: on a CPU with AVX2 alone a matrix product in bf16 takes hundreds of
    times as long as in fp32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def choose_attention() -> str:
    """The fastest attention here: `pretrain.attention`'s, or transformers' "sdpa"."""
    if training_defaults()["use_cpu"]:
        return BLOCKWISE
    ampere = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return PACKED if ampere and torch.version.hip is None else "sdpa"


def can_compile() -> bool:
    """Whether torch.compile makes GPU kernels here: it needs Triton and a C compiler.

    On CPUs it did not pay (docs/pretraining.md).
    """
    gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (7, 0)
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return gpu and importlib.util.find_spec("triton") is not None and compiler is not None


def measure_memory() -> int:
    """Bytes of the first GPU's memory, else of this machine's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return measure_host_memory()


def measure_host_memory() -> int:
    """Bytes of this machine's memory, whatever GPU it has."""
    return psutil.virtual_memory().total


def measure_free_memory() -> int:
    """Bytes of it that programs can still get."""
    return psutil.virtual_memory().available


def set_up_process(training_args: TrainingArguments | None = None) -> None:
    """What every stage does first: quiet logs, kept memory; where it trains, processes that meet.

    Raises:
        ValueError: the launcher started another number of processes than the trainer sees, or fp16
            was asked for on a CPU.
    """
    quiet_logs()
    keep_freed_memory()
    if training_args is not None:
        stages.check_world_size(training_args.world_size)  # asking makes the processes meet
        join_deepspeed(training_args)
        refuse_fp16_on_cpu(training_args)
        atexit.register(leave_processes)


def refuse_fp16_on_cpu(training_args: TrainingArguments) -> None:
    """Raise a ValueError: accelerate would compute in fp32 there, without a word."""
    is_cpu = training_args.device.type == "cpu" and training_args.deepspeed_plugin is None
    if training_args.fp16 and is_cpu:
        raise ValueError("fp16 needs a GPU: on this CPU use bf16 or fp32 (--fp16 false)")


def join_deepspeed(training_args: TrainingArguments) -> None:
    """Tell DeepSpeed of the processes that torch knows: on CPUs accelerate does not.

    Without it ZeRO-3 believes to be alone while a model is made, and refuses the batch size.
    """
    wanted = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if (wanted or training_args.deepspeed) and torch.distributed.is_initialized():
        import deepspeed

        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def leave_processes() -> None:
    """End the communication in order: its threads could otherwise abort a process that has done."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks instead of handing each back to the system.

    A training step allocates the same tensors again and again; giving every page back and
    faulting it in anew costs a CPU up to a seventh of the step.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # not in musl
        libc.mallopt(ctypes.c_int(-4), ctypes.c_int(0))  # M_MMAP_MAX: no mapping for large blocks
        libc.mallopt(ctypes.c_int(-1), ctypes.c_int(-1))  # M_TRIM_THRESHOLD: never hand back


def quiet_logs() -> None:
    """Silence what third parties print on every normal run; errors and our own lines stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed finds the same, with a warning
    warnings.filterwarnings("ignore", category=FutureWarning)
    unneeded = ".*(pin_memory|TRANSFORMERS_CACHE|lr_scheduler|fan_in_fan_out).*"
    warnings.filterwarnings("ignore", message=unneeded)
    for name in (
        "bitsandbytes",
        "accelerate",
        "DeepSpeed",
        "torch.distributed",
        "httpx",
        "matplotlib",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    if not os.isatty(2):
        os.environ.setdefault("TQDM_DISABLE", "1")  # for TRL's own bars
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
