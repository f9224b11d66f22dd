"""What a run shows and writes while it trains. Every later stage uses these."""

import json
import math
import time
from pathlib import Path

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

SHOWN = ("loss", "eval_loss", "reward", "ppo/score", "ppo/kl", "rewards/accuracies")


def watch(trainer: Trainer, *callbacks: TrainerCallback) -> None:
    """Replace transformers' printed dictionaries by a progress bar and metrics.jsonl.

    Args:
        callbacks: run before these, so that what they add to a log is written.
    """
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, ProgressCallback | PrinterCallback):
            trainer.remove_callback(callback)
    shown = PlainProgress() if trainer.args.disable_tqdm else Progress()
    for callback in (*callbacks, shown, MetricsFile(trainer.args.output_dir), StopOnNaN()):
        trainer.add_callback(callback)


def _newest(logs: dict) -> dict[str, str]:
    """The few numbers that tell whether a run goes well."""
    return {key.split("/")[-1]: f"{float(logs[key]):.3f}" for key in SHOWN if key in logs}


class Progress(ProgressCallback):
    """One bar for the run, with the newest numbers beside it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the newest numbers."""
        if self.training_bar is not None and logs and (shown := _newest(logs)):
            self.training_bar.set_postfix(shown)


class PlainProgress(TrainerCallback):
    """Where there is no terminal: about ten lines for a run."""

    printed = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print a line when another tenth of the run is done."""
        tenth = 10 * state.global_step // max(state.max_steps, 1)
        if state.is_world_process_zero and tenth > self.printed and (shown := _newest(logs or {})):
            self.printed = tenth
            numbers = ", ".join(f"{key} {value}" for key, value in shown.items())
            print(f"  step {state.global_step}/{state.max_steps}: {numbers}", flush=True)


class MetricsFile(TrainerCallback):
    """Append every log to metrics.jsonl: one JSON object a line, with step and time.

    `elapsed_s` is the wall time since this process began to train. On resume the lines behind the
    checkpoint are dropped, so that no step stands there twice.
    """

    def __init__(self, output_dir: str):
        self.path = Path(output_dir) / "metrics.jsonl"
        self.started_at = time.time()

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the file, or cut it back to the checkpoint."""
        self.started_at = time.time()
        if not state.is_world_process_zero:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        text = "".join(line + "\n" for line in kept)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text if state.global_step else "", encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write one line."""
        if not state.is_world_process_zero or not logs:
            return
        line = {"step": state.global_step, "elapsed_s": round(time.time() - self.started_at, 2)}
        line |= {key: _number(value) for key, value in logs.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _number(value):
    """A JSON value: JSON has no NaN."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        return str(value)
    return round(value, 6) if math.isfinite(value) else None


class StopOnNaN(TrainerCallback):
    """Stop when the loss is not a number: what follows would be noise."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Raise a ValueError on a non-finite loss."""
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(float(loss)):
            raise ValueError(
                f"the loss is {loss} at step {state.global_step}. Lower learning_rate "
                f"({args.learning_rate}), or look at the data of the steps before it"
            )


class Throughput(TrainerCallback):
    """Add tokens a second to the logs.

    Args:
        tokens_per_step: tokens that all processes see in one optimizer step.
    """

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self.last = (0, time.time())

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.last = (state.global_step, time.time())

    def on_log(self, args, state, control, logs=None, **kwargs):
        """tokens/s since the last log."""
        if logs is None or "loss" not in logs:
            return
        step, now = state.global_step, time.time()
        if step > self.last[0]:
            seconds = now - self.last[1]
            logs["tokens_per_second"] = (step - self.last[0]) * self.tokens_per_step / seconds
        self.last = (step, now)
