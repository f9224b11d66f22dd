"""The language model's loss, fused with its head: no tensor of (all tokens, vocabulary) exists."""

import torch

LOGITS_AT_ONCE = 2**20  # a chunk's logits: 4 MB in fp32, which stay in a CPU's cache
FEWEST_ROWS = 256  # of a chunk: fewer make slow matrix products


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T`, computed a chunk of tokens at a time.

    The gradients are made in the forward pass, where a chunk's logits are at hand, and are only
    scaled in the backward pass. With N tokens, C channels and V words: hidden (N, C), weight
    (V, C), labels (N,) with -100 for tokens without a loss.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, count):
        """The summed loss in nats, divided by `count`; a scalar in fp32."""
        device = hidden.device.type
        fast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if fast else weight.dtype
        with torch.autocast(device, enabled=False):
            rows, head = hidden.to(dtype), weight.to(dtype)
            rows_grad = torch.empty_like(rows)
            head_grad = torch.zeros_like(weight, dtype=torch.float32)
            loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
            size = max(FEWEST_ROWS, LOGITS_AT_ONCE // weight.shape[0])
            for start in range(0, len(rows), size):
                part, target = rows[start : start + size], labels[start : start + size]
                counted = target != -100
                target = target.masked_fill(~counted, 0).unsqueeze(1)
                logits = (part @ head.T).float()
                normaliser = logits.logsumexp(dim=1, keepdim=True)
                loss += ((normaliser - logits.gather(1, target)).squeeze(1) * counted).sum()
                # d loss / d logits = softmax(logits) - one_hot(target)
                grad = logits.sub_(normaliser).exp_()
                grad.scatter_add_(1, target, -torch.ones_like(normaliser))
                grad = grad.mul_((counted / count).unsqueeze(1)).to(dtype)
                torch.mm(grad, head, out=rows_grad[start : start + size])
                head_grad += grad.T @ part
        ctx.save_for_backward(rows_grad.to(hidden.dtype), head_grad.to(weight.dtype))
        return loss / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """Scale the gradients that the forward pass has made."""
        rows_grad, head_grad = ctx.saved_tensors
        return rows_grad * grad, head_grad * grad, None, None


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
    targets = labels[:, 1:].reshape(-1)
    count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return LinearCrossEntropy.apply(
        hidden[:, :-1].reshape(-1, hidden.shape[-1]), weight, targets, count
    )
