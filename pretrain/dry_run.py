"""`--dry_run`: a stage as it is, up to its first optimizer step, then what was found out."""

import math
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import stages
from provenance import measure_peak_memory


class DryRun(TrainerCallback):
    """Ends the process before the first optimizer step, when a whole batch has gone both ways.

    Until then everything is real: data, model, rollouts, loss and gradients. So what would stop a
    run in its first minutes stops this. The batch is made of the longest rows, so that one which
    does not fit into memory is met here and not an hour later.

    Args:
        trainer: what would train.
        run: a dry run (`run.scratch` is set).
    """

    def __init__(self, trainer: Trainer, run: stages.Run):
        self.trainer, self.run = trainer, run
        self.started_at = 0.0
        self.rows = len(trainer.train_dataset)
        self.longest = put_longest_first(trainer)

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.started_at = self.started_at or time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Report and exit.

        Raises:
            ValueError: the gradient is not finite.
        """
        step_s = time.perf_counter() - self.started_at
        facts = describe_model(model) | {"rows": f"{self.rows:,}"}
        facts |= describe_batch(self.trainer.args, state.max_steps)
        if self.longest is not None:
            facts["tried"] = f"the longest rows, up to {self.longest:,} tokens"
        facts["gradient"] = describe_gradient(model)
        facts["first_step"] = f"{step_s:.2f} s without the update; the next ones are faster"
        facts["peak_memory"] = f"{measure_peak_memory() / 1e9:.2f} GB"
        if torch.cuda.is_available():
            facts["peak_memory"] += f", GPU {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
        self.run.end_dry_run(**facts)


def describe_gradient(model: Any) -> str:
    """The norm of all gradients together, as the optimizer would see them (after clipping).

    Raises:
        ValueError: it is not finite.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients or any(hasattr(p, "ds_id") for p in model.parameters()):
        return "held by DeepSpeed"
    norm = torch.nn.utils.get_total_norm(gradients).item()
    if not math.isfinite(norm):
        raise ValueError(
            f"the first batch's gradient has norm {norm}: one step would spoil the model. Look at "
            "the rows: python scripts/inspect_data.py CONFIG; then at the learning rate and dtype"
        )
    return f"norm {norm:.4g}" + ("" if norm else ": this batch teaches nothing")


def describe_model(model: Any) -> dict[str, str]:
    """Parameters, and how many of them are trained."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    where = f"{', '.join(dtypes)} on {next(model.parameters()).device}"
    return {"parameters": f"{total:,} ({where}), {trained:,} trained"}


def put_longest_first(trainer: Trainer) -> int | None:
    """Leave the trainer only the longest rows, as many as a step takes: its batch, in any order.

    Returns:
        Tokens of the longest row; None where the rows are prompts, whose answers come later.
    """
    args, lengths = trainer.args, measure_rows(trainer.train_dataset)
    if lengths is None:
        return None
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    longest = np.argsort(-lengths, kind="stable")[:batch]
    trainer.train_dataset = trainer.train_dataset.select(longest)
    return int(lengths[longest[0]])


def measure_rows(rows: Dataset) -> np.ndarray | None:
    """Tokens of each row, of a pair its longer side; None for rows that are no tokens yet."""
    sides = {"input_ids", "chosen_ids", "rejected_ids"} & set(rows.column_names)
    if not sides:
        return None
    lengths = []
    for part in rows.with_format("arrow").iter(batch_size=10_000):
        columns = {name: part[name].combine_chunks() for name in part.column_names}
        tokens = {
            name: np.asarray(column.value_lengths())
            for name, column in columns.items()
            if name in sides or name == "prompt_ids"
        }
        prompt = tokens.pop("prompt_ids", 0)
        lengths.append(prompt + np.max(list(tokens.values()), axis=0))
    return np.concatenate(lengths)


def describe_batch(args: TrainingArguments, max_steps: int) -> dict[str, str]:
    """The batch of one step, and what the steps add up to."""
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    steps = "as many as the minutes hold" if max_steps >= 10**9 else f"{max_steps:,}"
    return {
        "batch": (
            f"{batch:,} a step = {args.train_batch_size} x {args.gradient_accumulation_steps} "
            f"accumulated x {args.world_size} process(es), computed in {precision}"
        ),
        "steps": steps,
    }
