"""The loss of the assistant's tokens: while training, with its weights, and on held-out rows."""

from contextlib import contextmanager
from typing import Any

import torch
from trl import SFTTrainer

from pretrain.eval import Z
from sft.model import complete_head


class ChatTrainer(SFTTrainer):
    """TRL's trainer, for rows that may have `loss_weights` (T,) beside `input_ids`.

    A weight multiplies the loss of its token. The sum is divided by the number of trained tokens,
    as without weights, so that 0.5 on every token is half the learning rate and no more.

    Raises:
        ValueError: weights with what would lose them: packing, another loss, smoothed labels.
    """

    def __init__(self, *args, train_dataset=None, **kwargs):
        super().__init__(*args, train_dataset=train_dataset, **kwargs)
        complete_head(self.model)
        if "loss_weights" not in train_dataset.column_names:
            return
        if self.padding_free or self.args.packing:
            raise ValueError(
                "packing: true keeps no loss_weight but 0 and 1; set packing: false, or give the "
                "rows weights of 0 and 1"
            )
        if self.args.loss_type != "nll" or self.args.label_smoothing_factor:
            raise ValueError(
                f"loss_type={self.args.loss_type!r} with label_smoothing_factor="
                f"{self.args.label_smoothing_factor} would not weigh a token by its loss_weight: "
                "set loss_type: nll and no smoothing, or give the rows weights of 0 and 1"
            )
        self.data_collator = WeightedCollator(self.data_collator)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "loss_weights" not in self._signature_columns:
            self._signature_columns.append("loss_weights")

    def compute_loss(self, model, inputs, *args, **kwargs):
        """TRL's loss, with each token's log-probability multiplied by its weight."""
        weights = inputs.pop("loss_weights", None)
        if weights is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with scaled_log_probs(self.accelerator.unwrap_model(model), weights[:, 1:]):
            return super().compute_loss(model, inputs, *args, **kwargs)


class WeightedCollator:
    """A collator of TRL, and `loss_weights` (B, T) beside what it makes; padding weighs 0."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Rows with `input_ids`, `labels` and perhaps `loss_weights`, each (T,)."""
        batch = self.collator(rows)
        if any(row.get("loss_weights") is None for row in rows):
            return batch  # of an evaluation set that has none
        weights = torch.zeros(batch["input_ids"].shape)
        for place, row in zip(weights, rows, strict=True):
            place[: len(row["loss_weights"])] = torch.tensor(row["loss_weights"])
        return batch | {"loss_weights": weights}


@contextmanager
def scaled_log_probs(model: torch.nn.Module, weights: torch.Tensor):
    """Multiply the `log_probs` (B, T - 1) of the model's outputs by `weights` in this context."""

    def scale(module, args, output):
        if getattr(output, "log_probs", None) is not None:
            output.log_probs = output.log_probs * weights.to(output.log_probs.device)
        return output

    hook = model.register_forward_hook(scale)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def held_out_loss(model: Any, rows: list[dict[str, list]], batch_size: int = 16) -> dict:
    """Nats for each trained token of rendered rows, every token counting the same.

    The trainer's own `eval_loss` is a mean of means of batches: a short answer's tokens count more
    in it.

    Returns:
        {"value", "low", "high", "n" (tokens), "unit"}; the 95 % interval is that of a ratio of sums
        over rows.
    """
    order = sorted(rows, key=lambda row: len(row["input_ids"]))  # little padding
    nats, counts = [], []
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(batch[-1]["input_ids"])
        pad = [width - len(row["input_ids"]) for row in batch]
        ids, mask, real = (
            torch.tensor(table, device=model.device)
            for table in (
                [row["input_ids"] + [0] * p for row, p in zip(batch, pad, strict=True)],
                [row["assistant_masks"] + [0] * p for row, p in zip(batch, pad, strict=True)],
                [[1] * (width - p) + [0] * p for p in pad],
            )
        )
        logits = model(input_ids=ids, attention_mask=real).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:], reduction="none"
        )
        nats += (losses * mask[:, 1:]).sum(dim=1).tolist()
        counts += mask[:, 1:].sum(dim=1).tolist()
    n, total = len(nats), sum(counts)
    mean = sum(nats) / total
    residuals = sum((loss - mean * count) ** 2 for loss, count in zip(nats, counts, strict=True))
    margin = Z * (residuals * n / max(n - 1, 1)) ** 0.5 / total
    numbers = {"value": mean, "low": mean - margin, "high": mean + margin}
    numbers = {name: round(value, 6) for name, value in numbers.items()}
    return numbers | {"n": total, "unit": "nats/assistant token"}
