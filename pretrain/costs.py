"""What training costs in arithmetic, and how much of it a device can do: both sides of an MFU."""

import re
import time

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

# Dense bf16 FLOP/s of the makers' data sheets. The first that stands in a device's name counts.
GPU_PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices that are multiplied to measure a peak
FEWEST_PRODUCTS = 5
MEASURED_S = 0.3  # shorter, and another program can have the cores all the while


def flops_per_token(config: PreTrainedConfig, context: int) -> int:
    """Training FLOPs a token, forward and backward: 6 M + 6 layers x width x context.

    PaLM's count (Chowdhery et al. 2022, appendix B). M is the parameters of all matrices, the
    output head once whether it is tied or not; embeddings are looked up and cost nothing. The
    attention's 12 layers x width x context is halved, since half of a causal row is masked. What a
    block saves because its documents do not see each other does not count, nor does what
    checkpointing computes twice.

    Args:
        config: of any causal language model of transformers.
        context: tokens a row.
    """
    with torch.device("meta"):  # shapes only
        model = AutoModelForCausalLM.from_config(config)
    matrices = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D)
    )
    head_width = getattr(config, "head_dim", None)
    head_width = head_width or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_width
    return 6 * matrices + 6 * config.num_hidden_layers * width * context


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Dense matrix FLOP/s of one device: from `GPU_PEAKS`, else measured in well under a second."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = [peak for key, peak in GPU_PEAKS.items() if re.search(rf"\b{key}\b", name)]
        if known:
            return known[0]
    return measure_peak(device, dtype)


def measure_peak(device: torch.device, dtype: torch.dtype, clock=time.perf_counter) -> float:
    """The rate of large matrix products, in FLOP/s; draws no random numbers.

    That of the fastest of a few: what else the machine does meanwhile can only make one slower.
    """
    side = SIDE.get(device.type, 2048)
    left = torch.ones(side, side, dtype=dtype, device=device)
    right = left.clone()
    durations: list[float] = []
    begun_at = clock()
    while len(durations) < FEWEST_PRODUCTS or clock() - begun_at < MEASURED_S:
        started_at = clock()
        left @ right
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        durations.append(clock() - started_at)
    return 2 * side**3 / min(durations)
