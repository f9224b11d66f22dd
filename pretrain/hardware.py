"""What this machine can do, and the training defaults that follow from it.

Configs say what is trained and never name a dtype or a device: that is decided here, by
capability, and can still be overridden by a flag.
"""

import logging
import os
import sys
import warnings

import torch


def training_defaults() -> dict:
    """Defaults of `TrainingArguments` for this machine; recipes and flags override them."""
    gpu = torch.cuda.is_available()
    return {
        "use_cpu": not gpu and not torch.backends.mps.is_available(),
        "bf16": supports_bf16(),
        "gradient_checkpointing": False,
        "dataloader_pin_memory": gpu,
        "report_to": [],
        "disable_tqdm": not sys.stderr.isatty(),
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


def quiet_logs() -> None:
    """Silence what third parties print on every normal run; errors and our own lines stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*(pin_memory|TRANSFORMERS_CACHE|lr_scheduler).*")
    for name in ("bitsandbytes", "accelerate", "DeepSpeed", "torch.distributed", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    if not os.isatty(2):
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
