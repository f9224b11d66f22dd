"""What a run shows and writes while it trains. Every later stage uses these."""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
)
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from pretrain.costs import peak_flops
from pretrain.curves import CurvesFile
from provenance import measure_peak_memory

UNKNOWN_STEPS = 10**9  # stands for the number of steps until `pretrain.budget` has fixed it
SHOWN = {  # key in the logs -> how it is shown
    "loss": "loss {:.3f}",
    "eval_loss": "held-out loss {:.3f}",
    "eval_perplexity": "perplexity {:.2f}",
    "eval_bits_per_byte": "{:.3f} bits/byte",
    "reward": "reward {:.3f}",
    "frac_reward_zero_std": "no spread {:.0%}",
    "completions/clipped_ratio": "cut off {:.0%}",
    "ppo/score": "score {:.3f}",
    "ppo/kl": "kl {:.3f}",
    "accuracy": "accuracy {:.3f}",
    "margin": "margin {:.3f}",
    "rewards/accuracies": "accuracies {:.3f}",
    "rewards/margins": "margin {:.3f}",
    "logps/chosen": "logps chosen {:.1f}",
    "logps/rejected": "rejected {:.1f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.0%}",
}


def watch(
    trainer: Trainer, *callbacks: TrainerCallback, early_stopping_patience: int | None = None
) -> None:
    """Show a run as a progress bar or plain lines, and write metrics.jsonl, runs/, curves.png.

    Args:
        callbacks: run before these, so that what they add to a log is shown and written.
        early_stopping_patience: evaluations in a row that may bring nothing better before the run
            stops; None never stops it.

    Raises:
        ValueError: the best evaluation cannot be kept with these evaluation and saving intervals,
            or the worst would be.
    """
    args = trainer.args
    check_best_model(args, early_stopping_patience)
    reporters = []
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, ProgressCallback | PrinterCallback):
            trainer.remove_callback(callback)
        elif isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values())):
            trainer.remove_callback(callback)  # to come last: it reports what the others add
            is_events = type(callback) is TensorBoardCallback
            reporters.append(EventFiles(args.output_dir) if is_events else callback)
    measures = [Memory()]
    if not any(isinstance(callback, Throughput) for callback in callbacks):
        measures.append(Throughput())
    if early_stopping_patience is not None:
        measures.append(EarlyStopping(early_stopping_patience))
    shown = PlainProgress() if args.disable_tqdm else Progress()
    files = [MetricsFile(args.output_dir), *reporters, CurvesFile(args.output_dir)]
    for callback in (*callbacks, *measures, shown, *files, StopOnNaN()):
        trainer.add_callback(callback)


def check_best_model(args, early_stopping_patience: int | None) -> None:
    """Raise a ValueError where the best evaluation's weights would not be there at the end."""
    if early_stopping_patience is not None and not args.load_best_model_at_end:
        raise ValueError(
            f"early_stopping_patience is {early_stopping_patience}, but the run would end with its "
            "last weights: set load_best_model_at_end: true"
        )
    if early_stopping_patience is not None and early_stopping_patience < 1:
        raise ValueError(
            f"early_stopping_patience is {early_stopping_patience}, and a run would end with its "
            "first step: give 1 evaluation or more, or leave it out"
        )
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    if args.greater_is_better and metric in ("loss", "perplexity", "bits_per_byte"):
        raise ValueError(
            f"of {metric} the highest would be kept as the best, which transformers assumes of all "
            "metrics but a loss: set greater_is_better: false"
        )
    if args.load_best_model_at_end and args.save_strategy == "steps":
        if args.save_steps != args.eval_steps:
            raise ValueError(
                "load_best_model_at_end needs a checkpoint of every evaluation: save_steps is "
                f"{args.save_steps}, eval_steps {args.eval_steps}; make them equal"
            )


def say(text: str) -> None:
    """Print a line at once, above the progress bar where there is one."""
    tqdm.write(text)
    sys.stdout.flush()


def describe(logs: dict) -> list[str]:
    """The few numbers that tell whether a run goes well, as they are shown."""
    return [shown.format(float(logs[key])) for key, shown in SHOWN.items() if key in logs]


class Progress(ProgressCallback):
    """One bar for the run, with the newest numbers beside it; tqdm adds the time that is left."""

    def __init__(self):
        super().__init__()
        self.newest: dict = {}

    def on_step_end(self, args, state, control, **kwargs):
        """Move on, towards a number of steps that may have been fixed meanwhile."""
        super().on_step_end(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.total = None if state.max_steps == UNKNOWN_STEPS else state.max_steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the newest numbers."""
        self.newest |= {key: value for key, value in (logs or {}).items() if key in SHOWN}
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(", ".join(describe(self.newest)))


class StepClock(TrainerCallback):
    """The time that training steps took, without logging, evaluating and saving.

    Args:
        clock: seconds; a test gives its own.
    """

    def __init__(self, clock=time.perf_counter):
        self.clock = clock
        self.steps_s = 0.0
        self.mark = clock()

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.steps_s, self.mark = 0.0, self.clock()

    def on_step_end(self, args, state, control, **kwargs):
        """Add the time since the last step, or since what came between."""
        now = self.clock()
        self.steps_s += now - self.mark
        self.mark = now

    def on_log(self, args, state, control, **kwargs):
        """What came between does not count."""
        self.mark = self.clock()

    on_evaluate = on_save = on_log


class PlainProgress(TrainerCallback):
    """Where there is no terminal: about ten lines for a run, and one an evaluation.

    Args:
        clock: seconds; a test gives its own.
    """

    def __init__(self, clock=time.perf_counter):
        self.clock = clock
        self.tenth = 0
        self.newest: dict = {}
        self.first = (0, 0.0)  # the first step of this process and when it ended: it is a slow one

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin anew, at a checkpoint's step or at none."""
        self.tenth = 10 * state.global_step // max(state.max_steps, 1)
        self.first = (0, 0.0)

    def on_step_end(self, args, state, control, **kwargs):
        """Remember when the first step ended."""
        if self.first[0] == 0:
            self.first = (state.global_step, self.clock())

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print a line when another tenth of the run is done, and after an evaluation."""
        logs = logs or {}
        tenth = 10 * state.global_step // max(state.max_steps, 1)
        held_out = "eval_loss" in logs
        if not held_out:  # of a rollout that serves several steps, only the first log has all
            self.newest |= {key: value for key, value in logs.items() if key in SHOWN}
        wanted = held_out or (tenth > self.tenth and "train_runtime" not in logs)
        if not (state.is_world_process_zero and wanted):
            return
        if not (numbers := describe(logs if held_out else self.newest)):
            return
        if not held_out:
            self.tenth = tenth
            if left := self.seconds_left(state):
                numbers.append(f"ETA {show_duration(left)}")
        steps = "?" if state.max_steps == UNKNOWN_STEPS else state.max_steps
        say(f"  step {state.global_step}/{steps}: {', '.join(numbers)}")

    def seconds_left(self, state) -> float | None:
        """Evaluations and all, at the rate since the first step; None at the first."""
        step, at = self.first
        if state.global_step == step:
            return None
        rate = (self.clock() - at) / (state.global_step - step)
        return rate * (state.max_steps - state.global_step)


def show_duration(seconds: float) -> str:
    """5 s, 4 min 03 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class LogFile(TrainerCallback):
    """A file of one JSON object a line, each with its step, in the output directory.

    On resume the lines behind the checkpoint are dropped, so that no step stands there twice; a run
    from step 0 starts it anew.
    """

    def __init__(self, output_dir: str, name: str):
        self.path = Path(output_dir) / name

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the file, or cut it back to the checkpoint."""
        if not state.is_world_process_zero:
            return
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        lines = text.split("\n")[:-1] if state.global_step else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.partial")  # a kill loses nothing
        beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        beside.replace(self.path)

    def append(self, line: dict) -> None:
        """Write one line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


class MetricsFile(LogFile):
    """Append every log to metrics.jsonl, with `elapsed_s`: wall time since this process trains."""

    def __init__(self, output_dir: str):
        super().__init__(output_dir, "metrics.jsonl")
        self.started_at = time.time()

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock and the file."""
        super().on_train_begin(args, state, control, **kwargs)
        self.started_at = time.time()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write one line."""
        if not state.is_world_process_zero or not logs:
            return
        line = {"step": state.global_step, "elapsed_s": round(time.time() - self.started_at, 2)}
        self.append(line | {key: _number(value) for key, value in logs.items()})


def _number(value):
    """A JSON value: JSON has no NaN."""
    if isinstance(value, int):
        return value
    try:
        value = float(value)
    except (TypeError, ValueError):
        return str(value)
    return round(value, 6) if math.isfinite(value) else None


class EventFiles(TensorBoardCallback):
    """TensorBoard's event files, in `runs` of the output directory.

    On resume the steps behind the checkpoint are marked as void; a run from step 0 removes the
    files of the run before.
    """

    def __init__(self, output_dir: str):
        super().__init__()
        self.logging_dir = self.logging_dir or str(Path(output_dir) / "runs")

    def on_train_begin(self, args, state, control, **kwargs):
        """Open a file."""
        if state.is_world_process_zero:
            if not state.global_step:
                for path in Path(self.logging_dir).glob("events.out.tfevents.*"):
                    path.unlink()
            first = state.global_step + 1 if state.global_step else None
            self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=first)
        super().on_train_begin(args, state, control, **kwargs)


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


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, whose count survives a resume: the logs tell it."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Count the evaluations so far that brought nothing better."""
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = 0
        metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        sign, best = (-1 if args.greater_is_better else 1), math.inf
        for value in (sign * log[metric] for log in state.log_history if metric in log):
            if best - value > self.early_stopping_threshold:
                self.early_stopping_patience_counter = 0
            else:
                self.early_stopping_patience_counter += 1
            best = min(best, value)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


class Memory(TrainerCallback):
    """Add this process's peak memory to the logs of training steps, and a GPU's peak where used."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Bytes, since the process began."""
        if logs is None or "loss" not in logs:
            return
        logs["peak_memory_bytes"] = measure_peak_memory()
        if args.device.type == "cuda":
            logs["gpu_peak_memory_bytes"] = torch.cuda.max_memory_allocated(args.device)


class Throughput(StepClock):
    """Add tokens a second, and the share of the machine's peak that they are (MFU), to the logs.

    The time of evaluations, of saving and of logging does not count.

    Args:
        count_tokens: gives the tokens that all processes have seen so far, since this one began;
            without it they are read off TRL's `num_tokens`.
        flops_per_token: of `pretrain.costs`, for the MFU.
    """

    def __init__(
        self,
        count_tokens: Callable[[], int] | None = None,
        flops_per_token: int | None = None,
        clock=time.perf_counter,
    ):
        super().__init__(clock)
        self.count_tokens = count_tokens
        self.flops_per_token = flops_per_token
        self.peak_flops_per_second: float | None = None  # of one process's device
        self.last: tuple[float | None, float] = (0, 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock, and measure the peak."""
        if self.flops_per_token and self.peak_flops_per_second is None:
            half = torch.float16 if args.fp16 else torch.float32
            dtype = torch.bfloat16 if args.bf16 else half
            self.peak_flops_per_second = peak_flops(args.device, dtype)
        super().on_train_begin(args, state, control, **kwargs)
        tokens = self.count_tokens() if self.count_tokens else None if state.global_step else 0
        self.last = (tokens, 0.0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """tokens/s of the steps since the last log."""
        if logs is not None and "loss" in logs:
            tokens = self.count_tokens() if self.count_tokens else logs.get("num_tokens")
            before, seconds = self.last[0], self.steps_s - self.last[1]
            if None not in (before, tokens) and seconds > 0:
                logs["tokens_per_second"] = (tokens - before) / seconds
                if self.peak_flops_per_second:
                    rate = logs["tokens_per_second"] * self.flops_per_token
                    logs["mfu"] = rate / self.peak_flops_per_second / args.world_size
            self.last = (tokens, self.steps_s)
        super().on_log(args, state, control, **kwargs)
