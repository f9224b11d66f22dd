"""What a model costs: parameters, FLOPs, memory. Formulas, each with its source.

Nothing is allocated: models are built on the meta device, where a tensor has a shape and no bytes.

    FLOPs       Kaplan et al. 2020 (6 a parameter and token), with the attention of Chowdhery et al.
                2022 (PaLM, appendix B)
    states      Rajbhandari et al. 2020 (ZeRO), and DeepSpeed's own estimators where it is installed
    activations Korthikanti et al. 2022, counted anew for what our layers keep for the backward pass
"""

import copy
import importlib.util
import re
import time
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pretrain.attention import BLOCKWISE, QUERIES
from pretrain.loss import choose_chunk
from pretrain.modeling_gpt import GPT2LMHeadModel

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
SETTINGS = ("ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


class Parameters(NamedTuple):
    """Parameters of a model: all, those in matrix products (the head too), its largest layer's."""

    total: int
    matrices: int
    largest_layer: int


def build_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config, without memory."""
    is_gpt2 = config.model_type == "gpt2"
    family = GPT2LMHeadModel if is_gpt2 else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        model = family(copy.deepcopy(config))  # `from_config` would make shards under ZeRO-3
    model.tie_weights()
    return model


def count_parameters(model: nn.Module) -> Parameters:
    """Count each parameter once; a tied head counts among the matrices, an embedding does not."""
    layers = [module for module in model.modules() if isinstance(module, Conv1D | nn.Linear)]
    blocks = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    largest = max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
    embedding = model.get_input_embeddings().weight.numel()
    return Parameters(
        total=sum(p.numel() for p in model.parameters()),
        matrices=sum(layer.weight.numel() for layer in layers),
        largest_layer=max(largest, embedding),
    )


def flops_per_token(config: PretrainedConfig, context: int) -> float:
    """Floating-point operations of forward and backward for one token of a training step.

    6 for each parameter in a matrix product, plus 12 n_layer x context x (heads x head width): the
    products of queries with keys and of weights with values. As is the custom, they count whole,
    although causality lets an implementation skip half of them.

    Args:
        config: of a decoder (gpt2, llama, qwen3, ...).
        context: tokens a row.
    """
    matrices = count_parameters(build_on_meta(config)).matrices
    return 6 * matrices + 12 * config.num_hidden_layers * context * _attention_width(config)


def _attention_width(config: PretrainedConfig) -> int:
    heads = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def optimizer_bytes(parameters: Parameters, optimizer: str, embedding: int) -> int:
    """Bytes of optimizer states in fp32: AdamW keeps two numbers a parameter, Muon one a matrix.

    Args:
        embedding: parameters of a tied head, which are among the matrices but are AdamW's.
    """
    if optimizer == "muon":
        return 8 * parameters.total - 4 * (parameters.matrices - embedding)
    return 8 * parameters.total


def activation_bytes(
    config: PretrainedConfig,
    rows: int,
    context: int,
    low_precision: bool,
    attention: str = "sdpa",
    checkpointing: bool = False,
) -> dict[str, int]:
    """Bytes that the backward pass needs, for one micro-batch of `rows` x `context` tokens.

    A pre-norm layer of width C keeps the two norms' inputs (fp32 under autocast) and, in the
    compute dtype, the inputs of its matrix products: C, query, key and value, the scaled query, the
    mixture, C, and the MLP's. "blockwise" also keeps the attention's weights, heads x context / 2
    numbers a token; fused kernels recompute them.

    Args:
        low_precision: bf16 or fp16 autocast over fp32 weights, else fp32.
        checkpointing: only the layers' inputs are kept, and one layer at a time is recomputed.

    Returns:
        {"layers", "head", "weight copies"} in bytes.
    """
    size, tokens = 2 if low_precision else 4, rows * context
    width, attended = config.hidden_size, _attention_width(config)
    heads = config.num_attention_heads
    kept = (getattr(config, "num_key_value_heads", None) or heads) / heads * attended
    if config.model_type == "gpt2":
        norms, inner = 8 * width, 2 * (config.n_inner or 4 * width)
    else:  # RMSNorm computes in fp32 and keeps the normalised copy; SwiGLU has two ways in
        norms, inner = 2 * (4 + 4 + size) * width, 4 * config.intermediate_size
        attended, kept = 2 * attended, 2 * kept  # before and after the rotation
    layer = norms + size * (2 * width + 3 * attended + 2 * kept + inner)
    if attention == BLOCKWISE:
        layer += size * heads * (context + min(QUERIES, context)) // 2
    layers = config.num_hidden_layers
    kept_layers = 4 * width * layers + layer if checkpointing else layer * layers
    copies = 0
    if low_precision:
        copies = size * count_parameters(build_on_meta(config)).matrices
    return {
        "layers": int(kept_layers * tokens),
        "head": _head_bytes(config, tokens, size),
        "weight copies": copies,
    }


def _head_bytes(config: PretrainedConfig, tokens: int, size: int) -> int:
    """The loss: chunks of logits where it is fused with the head, else whole ones in fp32."""
    if config.model_type != "gpt2":  # logits, their fp32 copy, log-softmax and gradient
        return tokens * config.vocab_size * (size + 4 + 4 + 4)
    rows = choose_chunk(tokens, config.vocab_size)
    chunk = 2 * size * rows * config.vocab_size  # logits and their softmax
    gradient = (4 + size) * config.vocab_size * config.hidden_size  # the sum, and a chunk's part
    return chunk + gradient + 2 * size * tokens * config.n_embd


class States(NamedTuple):
    """Bytes of weights, gradients and optimizer states: on one GPU, and in its host's memory."""

    device: int
    host: int
    source: str


def state_bytes(
    parameters: Parameters, setting: str, processes: int, optimizer_states: int
) -> States:
    """Weights, gradients and optimizer states of one process.

    DDP keeps everything in fp32, and its buckets hold the gradients once more. ZeRO computes in
    16 bits beside an fp32 copy: 2 + 2 for weights and gradients, 4 + 4 + 8 for the fp32 gradient,
    the fp32 weight and AdamW.

    Args:
        setting: one of `SETTINGS`; with "ddp", one process is plain training.
        processes: GPUs, all on one node.
        optimizer_states: bytes; ZeRO's AdamW is reckoned in its own way.
    """
    total = parameters.total
    if setting == "ddp":
        gradients = 8 if processes > 1 else 4
        return States((4 + gradients) * total + optimizer_states, 0, "4 + 4 bytes, optimizer")
    if setting == "zero1":  # DeepSpeed has no estimator for it
        return States(4 * total + 16 * total // processes, 0, "ZeRO paper: 4 + 16 / N")
    offload = setting.endswith("offload")
    if importlib.util.find_spec("deepspeed") is None:
        share = total // processes
        whole = 2 * total if setting.startswith("zero2") else 4 * parameters.largest_layer
        moved = 18 * share * processes
        device, host = (whole, moved) if offload else (whole + 18 * share, 0)
        return States(device, host, "ZeRO paper; deepspeed is not installed")
    host, device = _ask_deepspeed(parameters, setting, processes, offload)
    return States(device, host, "deepspeed's estimator")


def _ask_deepspeed(parameters: Parameters, setting: str, processes: int, offload: bool) -> Any:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    if setting.startswith("zero2"):
        return estimate_zero2_model_states_mem_needs(
            parameters.total, num_gpus_per_node=processes, cpu_offload=offload
        )
    return estimate_zero3_model_states_mem_needs(
        parameters.total,
        parameters.largest_layer,
        num_gpus_per_node=processes,
        cpu_offload=offload,
        cpu_offload_params=offload,
    )[:2]


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
