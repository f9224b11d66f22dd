"""`--minutes`: the number of steps that fit into a time, measured while the run begins.

The first steps are trained at the very start of the warm-up, and timed, with one evaluation and
one checkpoint. Then the number of steps is fixed, and the learning rate's schedule is that of a run
of so many steps. Checkpoints hold the number (trainer_state.json): a resumed run keeps it.
"""

import json
import math
import time
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from pretrain.callbacks import UNKNOWN_STEPS, StepClock, say

SLOW_STEPS = 2  # at the beginning: memory is allocated, kernels are chosen or compiled
TIMED_STEPS = 5  # at least, and at least for TIMED_SHARE of the time
TIMED_SHARE = 0.02
ENOUGH_SHARE = 0.25  # of the time: fix the number after one timed step


def plan_steps(args: TrainingArguments, minutes: float, checkpoint: str | None) -> None:
    """Set `args.max_steps` to the number that the checkpoint knows, or to `UNKNOWN_STEPS`.

    Raises:
        ValueError: no time, or a schedule that does not know its end.
    """
    if not 0 < minutes < math.inf:
        raise ValueError(f"minutes is {minutes}: give a positive number, or leave it out")
    if not isinstance(make_scheduler(args, steps=100), LambdaLR):
        raise ValueError(
            f"minutes needs a schedule with an end, not {args.lr_scheduler_type.value}: set "
            "lr_scheduler_type to cosine, linear or warmup_stable_decay"
        )
    args.max_steps = UNKNOWN_STEPS
    if checkpoint is not None:
        state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
        args.max_steps = state["max_steps"]


def make_scheduler(args: TrainingArguments, steps: int):
    """The schedule of a run of so many steps, on an optimizer of its own."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=schedule_settings(args, steps),
    )


def schedule_settings(args: TrainingArguments, steps: int) -> dict:
    """`lr_scheduler_kwargs`, where `num_decay_steps` may be a share below 1, as `warmup_steps`.

    Raises:
        ValueError: warmup_stable_decay without it.
    """
    settings = dict(args.lr_scheduler_kwargs or {})
    if args.lr_scheduler_type == "warmup_stable_decay" and "num_decay_steps" not in settings:
        raise ValueError(
            "warmup_stable_decay needs its decay, in steps or as a share of them: "
            "lr_scheduler_kwargs: {num_decay_steps: 0.2}"
        )
    if 0 < settings.get("num_decay_steps", 0) < 1:
        settings["num_decay_steps"] = math.ceil(settings["num_decay_steps"] * steps)
    return settings


def choose_steps(left_s: float, step_s: float, between_s: dict[float, float], end_s: float) -> int:
    """Steps that fit into a time, at least one.

    Args:
        left_s: the time.
        step_s: of one step.
        between_s: {steps from one to the next: its time} of evaluations and checkpoints.
        end_s: what the last step is followed by.
    """
    each = step_s + sum(seconds / steps for steps, seconds in between_s.items())
    return max(1, math.floor((left_s - end_s) / each))


class Budget(StepClock):
    """Fix the number of steps once the first ones are timed.

    Args:
        minutes: from the beginning of training to its last step, with its evaluations and
            checkpoints; starting up and the measurements after training are not in it.
        clock: seconds; a test gives its own. Where several processes train, the first one's counts.
    """

    def __init__(self, minutes: float, clock=time.perf_counter):
        self.minutes, self.timing = minutes, False
        super().__init__(lambda: _agree(clock()))

    def on_train_begin(self, args, state, control, **kwargs):
        """Time steps, unless the number is known from a checkpoint."""
        self.timing = state.max_steps == UNKNOWN_STEPS
        super().on_train_begin(args, state, control, **kwargs)
        self.started_at = self.ended_at = self.mark
        self.first_timed = state.global_step + SLOW_STEPS
        self.evaluation_s = self.save_s = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        """Behind the slow steps, evaluate and save once for the time that it takes."""
        if not self.timing:
            return
        super().on_step_end(args, state, control, **kwargs)
        self.ended_at = self.mark
        if state.global_step == self.first_timed:
            self.steps_s = 0.0
            control.should_evaluate |= args.eval_strategy != "no"
            control.should_save |= args.save_strategy in ("steps", "epoch")

    def on_evaluate(self, args, state, control, **kwargs):
        """Take its time."""
        self.evaluation_s = self.take_time()

    def on_save(self, args, state, control, **kwargs):
        """Take its time."""
        self.save_s = self.take_time()

    def take_time(self) -> float:
        """Seconds since the step, or what followed it, ended; it is over now."""
        if not self.timing:
            return 0.0
        self.mark = self.clock()
        seconds, self.ended_at = self.mark - self.ended_at, self.mark
        return seconds

    def on_optimizer_step(self, args, state, control, lr_scheduler=None, **kwargs):
        """Fix the number where enough is known; the schedule's next step is of the new schedule."""
        timed = state.global_step - self.first_timed
        if not self.timing or timed < 1:
            return
        passed_s, budget_s = self.clock() - self.started_at, 60 * self.minutes
        known = timed >= TIMED_STEPS and passed_s >= TIMED_SHARE * budget_s
        if not known and passed_s < ENOUGH_SHARE * budget_s:
            return
        step_s = self.steps_s / timed
        epoch = state.global_step / state.epoch
        between_s, end_s = self.reserve(args, epoch)
        left = choose_steps(budget_s - passed_s, step_s, between_s, end_s)
        state.max_steps = state.global_step + 1 + left
        state.compute_steps(args, state.max_steps)
        schedule = make_scheduler(args, state.max_steps).lr_lambdas[0]
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # DeepSpeed's wraps it
        scheduler.lr_lambdas = [schedule] * len(scheduler.lr_lambdas)
        self.timing = False
        if state.is_world_process_zero:
            say(
                f"  {self.minutes:g} minutes hold {state.max_steps:,} steps of {step_s:.3f} s "
                f"(an evaluation {self.evaluation_s:.2f} s, a checkpoint {self.save_s:.2f} s)"
            )

    def reserve(self, args, epoch: float) -> tuple[dict[float, float], float]:
        """Time between steps by how often it is needed, and time at the end (`choose_steps`).

        Args:
            epoch: steps of one.
        """
        between_s, end_s = {}, 0.0
        evaluations = (args.eval_strategy, args.eval_steps)
        saves = (args.save_strategy, args.save_steps)
        if args.save_strategy == "best":  # at most each evaluation is the best
            saves = evaluations
        for (strategy, every), seconds in ((evaluations, self.evaluation_s), (saves, self.save_s)):
            if strategy == "no":
                continue
            every = epoch if strategy == "epoch" else every
            if every < 1:  # a share of the steps: so many times in all
                end_s += seconds / every
            else:
                between_s[every] = between_s.get(every, 0.0) + seconds
                end_s += seconds
        return between_s, end_s

    def on_log(self, args, state, control, logs=None, **kwargs):
        """What came between does not count; correct the rate that was made of unknown steps."""
        if self.timing:
            super().on_log(args, state, control, **kwargs)
        if logs and "train_samples_per_second" in logs and args.max_steps == UNKNOWN_STEPS:
            logs["train_samples_per_second"] *= state.max_steps / UNKNOWN_STEPS


def _agree(seconds: float) -> float:
    """The first process's value, for all: they must choose the same number of steps."""
    return broadcast_object_list([seconds])[0]
