"""Causal attention that is faster than transformers' "sdpa", on CPUs and for packed rows on GPUs.

Importing this module registers both with transformers, so any model that goes through its attention
registry can use them:

    AutoModelForCausalLM.from_pretrained(path, attn_implementation="blockwise")

"blockwise", for CPUs: torch's CPU kernel for `scaled_dot_product_attention` computes bf16 no faster
than fp32. Here each block of queries is two plain matrix products, which a CPU computes at its full
bf16 rate, over only the keys that causality lets the block see.

"packed", for CUDA: where the collator says where documents end, torch's flash kernel reads only
them; the dense mask of packed rows would keep "sdpa" from that kernel. All else is "sdpa".
"""

import torch
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCKWISE = "blockwise"
PACKED = "packed"
QUERIES = 128  # of a block: 64 to 256 are within a tenth of each other at contexts of 256 to 1,024


class BlockwiseAttention(torch.autograd.Function):
    """softmax(Q K^T + mask) V by blocks of queries; the weights are kept for the backward pass.

    Shapes: query (B, H, T, d), already scaled; key, value (B, H, S, d); mask (B, 1, T, S), added to
    the scores, or None. `causal` means T == S and no query sees a later key, whatever the mask
    says. The output is (B, T, H, d). A row that the mask forbids everything averages the values.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, causal):
        """Each block of queries, from the keys that it may see."""
        batch, heads, time, width = query.shape
        # One batch dimension: a slice of it goes into a matrix product as it is, uncopied.
        query, key, value = (x.reshape(-1, x.shape[2], width) for x in (query, key, value))
        output = torch.empty_like(query)
        kept = []
        with torch.autocast(query.device.type, enabled=False):  # it would make the softmax fp32
            for start in range(0, time, QUERIES):
                block = slice(start, min(start + QUERIES, time))
                seen = block.stop if causal else key.shape[1]
                scores = torch.bmm(query[:, block], key[:, :seen].transpose(1, 2))
                if mask is not None:
                    scores.view(batch, heads, -1, seen).add_(mask[:, :, block, :seen])
                elif causal:
                    scores[:, :, start:] += _hide_later(block.stop - start, scores)
                weights = scores.softmax(dim=-1)
                output[:, block] = torch.bmm(weights, value[:, :seen])
                kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        return output.view(batch, heads, time, width).transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """Gradients of query, key and value; grad is (B, T, H, d)."""
        query, key, value, *kept = ctx.saved_tensors
        batch, _, heads, _ = grad.shape
        grad = grad.transpose(1, 2).reshape(query.shape)
        query_grad, key_grad, value_grad = torch.empty_like(query), None, None
        stop = query.shape[1]
        with torch.autocast(query.device.type, enabled=False):
            for weights in reversed(kept):  # the last block sees all keys: its sums are the first
                block, seen = slice(stop - weights.shape[1], stop), weights.shape[2]
                weights_grad = torch.bmm(grad[:, block], value[:, :seen].transpose(1, 2))
                scores_grad = torch._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
                query_grad[:, block] = torch.bmm(scores_grad, key[:, :seen])
                value_part = torch.bmm(weights.transpose(1, 2), grad[:, block])
                key_part = torch.bmm(scores_grad.transpose(1, 2), query[:, block])
                if key_grad is None:
                    key_grad, value_grad = key_part.float(), value_part.float()
                else:
                    key_grad[:, :seen] += key_part
                    value_grad[:, :seen] += value_part
                stop = block.start
        grads = (query_grad, key_grad.to(key.dtype), value_grad.to(value.dtype))
        return *(x.view(batch, heads, *x.shape[1:]) for x in grads), None, None


def _hide_later(size: int, like: torch.Tensor) -> torch.Tensor:
    """(size, size) with the dtype's lowest value above the diagonal, 0 elsewhere."""
    return torch.full((size, size), _lowest(like.dtype), dtype=like.dtype).triu(1).to(like.device)


def _lowest(dtype: torch.dtype) -> float:
    """Instead of -inf: where a row sees nothing, a softmax over -inf alone would be NaN."""
    return torch.finfo(dtype).min / 2  # half, so that a score added to it stays finite


def blockwise_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs
):
    """Attention as transformers' registry calls it; same results as "sdpa" up to rounding.

    Args:
        query: (B, heads, T, d); key, value: (B, key-value heads, S, d).
        attention_mask: (B, 1, T, S) from `blockwise_mask`, or None: plainly causal.

    Returns:
        (B, T, heads, d), and None instead of the weights.
    """
    if dropout:  # training with attention dropout is rare; the fused kernel has it
        mask = None if attention_mask is None else attention_mask.to(query.dtype)
        return sdpa_attention_forward(
            module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs
        )
    # Rotary positions are fp32 under autocast, and so are what they turn: llama, qwen3.
    query, key = query.to(value.dtype), key.to(value.dtype)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    time = query.shape[2]
    if attention_mask is None and time > 1:
        key, value = key[:, :, :time], value[:, :, :time]  # a static cache is longer than its text
    causal = time > 1 and time == key.shape[2]
    mask = None if attention_mask is None else attention_mask.to(query.dtype)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return BlockwiseAttention.apply(query * scaling, key, value, mask, causal), None


def blockwise_mask(*args, dtype: torch.dtype = torch.float32, **kwargs) -> torch.Tensor | None:
    """The mask of "sdpa" as numbers to add to the scores; None where it is plainly causal."""
    allowed = sdpa_mask(*args, **kwargs)
    if allowed is None:
        return None
    if torch.is_autocast_enabled(allowed.device.type):  # the dtype that the scores will have
        dtype = torch.get_autocast_dtype(allowed.device.type)
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, _lowest(dtype))


def packed_attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, **kwargs):
    """Attention within the documents of packed rows, by torch's flash kernel where it can run.

    Args:
        query: (B, heads, T, d); key, value: (B, key-value heads, S, d).
        attention_mask: the dense mask of "sdpa", which says the same; the kernel needs none.
        cu_seq_lens_q: (documents + 1,) int32, where documents begin in the B x T tokens, and B x T;
            None where rows are not packed. The name is transformers'.

    Returns:
        (B, T, heads, d), and None instead of the weights.
    """
    if cu_seq_lens_q is None or kwargs.get("dropout") or not runs_flash(value):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # Rotary positions are fp32 under autocast, and so are what they turn: llama, qwen3.
    rows = [x.to(value.dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    time = query.shape[2]  # no document is longer, and a number that never changes compiles once
    mixed = varlen.varlen_attn(
        *rows, cu_seq_lens_q, cu_seq_lens_q, time, time, scale=kwargs.get("scaling"),
        window_size=(-1, 0), enable_gqa=True,
    )  # fmt: skip
    return mixed.view(query.shape[0], time, *mixed.shape[1:]), None


def runs_flash(value: torch.Tensor) -> bool:
    """Whether torch's flash kernel takes this tensor."""
    return value.is_cuda and value.dtype in (torch.bfloat16, torch.float16)


AttentionInterface.register(BLOCKWISE, blockwise_attention)
AttentionMaskInterface.register(BLOCKWISE, blockwise_mask)
AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
