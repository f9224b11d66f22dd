"""The language model's loss, fused with its head: no tensor of (all tokens, vocabulary) exists."""

import torch
from torch import nn

LOGITS_AT_ONCE = 2**25  # of a chunk: 64 MB in bf16; each chunk adds a whole gradient of the head
ROWS = 256  # a chunk has a multiple of it: fewer, or an odd number, make slow matrix products


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T`, computed a chunk of tokens at a time.

    The gradients are made in the forward pass, where a chunk's logits are at hand, and are only
    scaled in the backward pass, which can therefore run once. With N tokens, C channels and V
    words: hidden (N, C), weight (V, C), labels (N,) with -100 for tokens without a loss. Under
    bf16 autocast the logits and their softmax are bf16, sums are fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, count):
        """The summed loss in nats, divided by `count`; a scalar in fp32."""
        device = hidden.device.type
        fast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if fast else weight.dtype
        dtype = torch.float32 if dtype == torch.float16 else dtype  # probabilities underflow in it
        with torch.autocast(device, enabled=False):
            rows, head = hidden.to(dtype), weight.to(dtype)
            rows_grad, head_grad = torch.empty_like(rows), None
            loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
            size = choose_chunk(len(rows), len(head))
            logits, softmax = (rows.new_empty(size, len(head)) for _ in range(2))
            for start in range(0, len(rows), size):
                part, target = rows[start : start + size], labels[start : start + size]
                counted = (target != -100).unsqueeze(1)
                grad = softmax[: len(part)]
                losses = _losses(part, head, target.clamp(min=0), logits[: len(part)], grad)
                loss += (losses * counted).sum()
                torch.mm(grad, head, out=rows_grad[start : start + size]).mul_(counted)
                added = grad.T @ (part * counted)
                head_grad = added.float() if head_grad is None else head_grad.add_(added)
        ctx.save_for_backward(
            (rows_grad / count).to(hidden.dtype), head_grad.div_(count).to(weight.dtype)
        )
        return loss / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """Scale the gradients that the forward pass has made."""
        rows_grad, head_grad = ctx.saved_tensors
        return rows_grad.mul_(grad), head_grad.mul_(grad), None, None


def choose_chunk(tokens: int, vocabulary: int) -> int:
    """Tokens whose logits are computed at once."""
    return min(tokens, max(ROWS, LOGITS_AT_ONCE // vocabulary // ROWS * ROWS))


def _losses(part, head, target, logits, grad) -> torch.Tensor:
    """Each token's loss in nats, (n, 1); leaves d loss / d logits = softmax - one_hot in `grad`.

    The target's probability p is as coarse as the dtype, and so would be p - 1 where p is nearly 1.
    The sum of all others is small there and therefore exact: it is the gradient, and -log(1 - it)
    the loss. Elsewhere the loss is (highest logit - target's logit) - log(highest probability).
    """
    index = torch.arange(len(target), device=target.device)
    torch.mm(part, head.T, out=logits)
    highest = logits.amax(dim=1, keepdim=True)
    torch.softmax(logits, dim=1, out=grad)
    distance = highest.float() - logits[index, target].unsqueeze(1).float()
    unlikely = distance - grad.amax(dim=1, keepdim=True).float().log()
    grad[index, target] = 0.0
    others = grad @ grad.new_ones(grad.shape[1], 1)
    grad[index, target] = -others.squeeze(1)
    others = others.float()
    return torch.where(others < 0.5, -torch.log1p(-others), unlikely)


def next_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Mean cross-entropy in nats a token of predicting each next token.

    Args:
        hidden: (B, T, C), the last hidden states.
        weight: (V, C), the output head.
        labels: (B, T), not shifted; -100 is ignored. `labels[:, t]` is predicted at t - 1.
        num_items_in_batch: labels of the whole optimizer step, which the mean is over; None
            counts those of this batch.
    """
    # Shifted; the last position has no target, but without it the products would be ill-shaped.
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
    count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return LinearCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), weight, targets, count)
