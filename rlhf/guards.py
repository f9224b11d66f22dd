"""Guards while a policy is trained: what it could do before must not be the price of the reward.

At the start and at every saving, the guards of `sft.eval` are measured on a few fixed held-out
rows. Where one has fallen by more than 5 % the log says so, with what the reward did meanwhile. The
newest checkpoint whose guards all hold is kept, and the run ends with its weights; where none
holds, with the last ones, and says so. guards.jsonl has all numbers, run.json the choice.
"""

import dataclasses
import json
from pathlib import Path

from transformers import Trainer

import stages
from comparison import GUARDS, UNITS, explain, judge
from pretrain.callbacks import LogFile, say
from sft.eval import EvalArguments, evaluate_chat, read_eval_config

ROWS = 64  # of each kind: seconds on a small model; the whole set is measured when the run ends
UNREAD_BY_POLICIES = {  # of what is trained on its own answers; see `sft.model.refuse_unread`
    "eval_strategy": "the guards of eval_config measure at every saving, on held-out rows",
    "label_smoothing_factor": "the answers are the policy's own",
}
REWARDS = ("ppo/score", "reward", "rewards/margins")  # keys of the logs: the first that is there


def watch_guards(trainer: Trainer, eval_config: str | None, run: stages.Run) -> list["Guards"]:
    """The callback for `watch(trainer, *watch_guards(...))`; none without an `eval_config`.

    Raises:
        ValueError: the trainer picks its best checkpoint itself, by another measure.
    """
    args = read_eval_config(eval_config)
    if args is None:
        return []
    if trainer.args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end picks a checkpoint by its loss, the guards of eval_config pick "
            "another by what it can still do: leave one of them out"
        )
    return [Guards(trainer, dataclasses.replace(args, max_rows=min(ROWS, args.max_rows)), run)]


def find_falls(before: dict[str, dict], after: dict[str, dict]) -> dict[str, float]:
    """The guards that got worse as the report card counts it (`comparison.judge`), and how much.

    Args:
        before: metrics as `sft.eval` gives them, {name: {"value", "unit", ...}}; `after` of the
            same rows.
    """
    falls = {}
    for name in GUARDS:
        sides = (found.get(name, {}) for found in (before, after))
        mark, change = judge(*sides, explain(name)[0])
        if mark == "worse":
            falls[name] = abs(change)
    return falls


def describe_falls(before: dict[str, dict], after: dict[str, dict]) -> str:
    """`stop_rate 0.980 -> 0.640 (34.7% lost)` of each guard that fell; empty where none did."""
    return ", ".join(
        f"{name} {before[name]['value']:.3f} -> {after[name]['value']:.3f} ({fall:.1%} lost)"
        for name, fall in find_falls(before, after).items()
    )


def report_falls(reference: str | Path | None, metrics: dict[str, dict]) -> str:
    """A sentence on the guards after a stage, against those of the model that it started from.

    Empty where the reference was not measured, on as many rows, or nothing fell.
    """
    before = (stages.read_json(Path(reference, "eval.json")) if reference else None) or {}
    same = {k: v for k, v in before.items() if v.get("n") == metrics.get(k, {}).get("n")}
    fallen = describe_falls(same, metrics)
    if not fallen:
        return ""
    gain = metrics.get("reward_score/gain", {}).get("value")
    meanwhile = describe_reward(0.0, gain, "reward model's score")
    return f"guards: against {reference}, {fallen}{meanwhile}"


def describe_reward(before: float | None, after: float | None, name: str = "reward") -> str:
    """What the reward, or what is named, did meanwhile."""
    if before is None or after is None:
        return ""
    verb = "rose" if after > before else "did not rise"
    return f", while the {name} {verb} ({before:.3f} -> {after:.3f})"


class Guards(LogFile):
    """Measures at each saving, and marks the best checkpoint as `state.best_model_checkpoint`.

    Every process measures, on the same rows: under ZeRO-3 each holds a part of the weights. Answers
    are greedy and no random number is drawn, so that a watched run ends like an unwatched one.

    Args:
        trainer: of a policy; its logs have one of `REWARDS`.
        args: what is measured.
        run: gets `record["guards"]`, for run.json.
    """

    def __init__(self, trainer: Trainer, args: EvalArguments, run: stages.Run):
        super().__init__(trainer.args.output_dir, "guards.jsonl")
        self.trainer, self.args, self.run = trainer, args, run
        self.lines: list[dict] = []
        self.first_reward: float | None = None
        self.rewards: list[float] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Measure the start; on resume, read what was measured before the checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        stages.wait_for_all_processes()  # the file is cut back
        self.lines, self.rewards, self.first_reward = [], [], None
        if state.global_step and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.lines = [json.loads(line) for line in lines]
            rewards = (line["first_reward"] for line in self.lines)
            self.first_reward = next((r for r in rewards if r is not None), None)
        if not self.lines:
            self.measure(model, state)
        self.choose(args, state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Remember the reward."""
        key = next((key for key in REWARDS if key in (logs or {})), None)
        if key is not None:
            self.rewards.append(float(logs[key]))
            if self.first_reward is None:
                self.first_reward = self.rewards[0]

    def on_save(self, args, state, control, model=None, **kwargs):
        """Measure, say what fell, and mark the best checkpoint."""
        line = self.measure(model, state)
        before, after = (wrap(one["guards"]) for one in (self.lines[0], line))
        if state.is_world_process_zero and (fallen := describe_falls(before, after)):
            reward = describe_reward(line["first_reward"], line["reward"])
            say(f"  guards at step {state.global_step}: {fallen}{reward}")
        self.choose(args, state)

    def measure(self, model, state) -> dict:
        """One line of guards.jsonl."""
        was_training = model.training
        model.eval()
        metrics, _ = evaluate_chat(model, self.trainer.processing_class, self.args)
        model.train(was_training)
        mean = sum(self.rewards) / len(self.rewards) if self.rewards else None
        line = {
            "step": state.global_step,
            "guards": {n: metrics[n]["value"] for n in GUARDS if n in metrics},
            "reward": mean,
            "first_reward": self.first_reward,
        }
        self.rewards = []
        self.lines.append(line)
        if state.is_world_process_zero:
            self.append(line)
        return line

    def choose(self, args, state) -> None:
        """Mark the newest checkpoint whose guards hold; where none does, the last one."""
        start, *saved = self.lines
        if not saved:
            return
        best = max(saved, key=lambda line: rank(start, line))
        checkpoint = Path(args.output_dir, f"checkpoint-{best['step']}")
        state.best_global_step, state.best_model_checkpoint = best["step"], str(checkpoint)
        args.load_best_model_at_end = best is not saved[-1]
        falls = find_falls(wrap(start["guards"]), wrap(best["guards"]))
        self.run.record["guards"] = {
            "checkpoint": checkpoint.name,
            "last_checkpoint": f"checkpoint-{saved[-1]['step']}",
            "before": start["guards"],
            "after": best["guards"],
            "lost": {name: round(fall, 4) for name, fall in falls.items()},
        }

    def on_train_end(self, args, state, control, **kwargs):
        """Say which checkpoint the output is."""
        record = self.run.record.get("guards")
        if record is None or not state.is_world_process_zero:
            return
        if record["checkpoint"] == record["last_checkpoint"]:
            how = "the last one" + (", though guards fell" if record["lost"] else "; guards hold")
        else:
            how = f"not {record['last_checkpoint']}: the newest whose guards hold"
        say(f"  guards: the output is {record['checkpoint']}, {how}")


def wrap(values: dict[str, float]) -> dict[str, dict]:
    """Plain numbers in the form of `sft.eval`."""
    return {name: {"value": v, "unit": UNITS.get(name, "share")} for name, v in values.items()}


def rank(start: dict, line: dict) -> tuple[bool, int]:
    """What a checkpoint is compared by: whether its guards hold, then its step."""
    return not find_falls(wrap(start["guards"]), wrap(line["guards"])), line["step"]
