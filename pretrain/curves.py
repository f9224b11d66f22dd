"""The picture of a run: curves.png beside metrics.jsonl."""

import json
from pathlib import Path

from transformers import TrainerCallback

# Key in metrics.jsonl (held out: "eval_" before it), label of the axis. What is absent is not
# drawn; where there is a reward it comes first, since the loss of a policy says little.
PANELS = (
    ("reward", "reward"),
    ("ppo/score", "reward-model score"),
    ("ppo/kl", "KL, nats an answer"),
    ("rewards/margins", "reward margin"),
    ("rewards/accuracies", "pairs in the right order"),
    ("margin", "score margin"),
    ("accuracy", "pairs in the right order"),
    ("loss", "loss, nats a token"),
)
UNITLESS_LOSS = "loss"  # of a policy or of pairs: no nats a token
NOISY = 20  # points; a curve of fewer is drawn as it is
SMOOTHING = 0.05  # share of a curve that a running mean is over


def draw_curves(output_dir: str | Path) -> Path | None:
    """Draw what metrics.jsonl of a directory holds into its curves.png.

    Training values are drawn faint with their running mean where there are many, held-out ones with
    marks.

    Returns:
        The picture's path; None where nothing was logged.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    output_dir = Path(output_dir)
    text = (output_dir / "metrics.jsonl").read_text(encoding="utf-8")
    log = [json.loads(line) for line in text.split("\n") if line]
    panels = [(key, label) for key, label in PANELS if read_points(log, key)]
    if not panels:
        return None
    figure = Figure(figsize=(8, 1 + 3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axis, (key, label) in zip(axes, panels, strict=True):
        draw_panel(axis, read_points(log, key), read_points(log, f"eval_{key}"))
        axis.set_ylabel(UNITLESS_LOSS if key == "loss" and len(panels) > 1 else label)
    axes[-1].set_xlabel("step")
    axes[0].set_title("/".join(output_dir.resolve().parts[-2:]))
    path = output_dir / "curves.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path


def draw_panel(axis, training: list[tuple], held_out: list[tuple]) -> None:
    """One key's values over steps."""
    steps, values = zip(*training, strict=True)
    if len(values) >= NOISY:
        axis.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        axis.plot(steps, smooth(values), color="tab:blue", label="training, running mean")
    else:
        axis.plot(steps, values, color="tab:blue", marker=".", label="training")
    if held_out:
        axis.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", label="held out")
    axis.legend()
    axis.grid(alpha=0.3)


def read_points(log: list[dict], key: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that have a finite value of a key."""
    return [(line["step"], line[key]) for line in log if line.get(key) is not None]


def smooth(values: tuple[float, ...]) -> list[float]:
    """The mean of each value and its neighbours, as many before as behind it: it does not lag."""
    reach = max(1, round(SMOOTHING * len(values) / 2))
    smoothed = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        window = values[i - near : i + near + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


class CurvesFile(TrainerCallback):
    """Draw the curves when training ends, and again for an evaluation that comes after."""

    def __init__(self, output_dir: str):
        self.output_dir = Path(output_dir)
        self.ended = False

    def on_train_begin(self, args, state, control, **kwargs):
        """A run from step 0 removes the picture of the run before."""
        self.ended = False
        if state.is_world_process_zero and not state.global_step:
            (self.output_dir / "curves.png").unlink(missing_ok=True)

    def on_train_end(self, args, state, control, **kwargs):
        """Draw."""
        self.ended = True
        if state.is_world_process_zero:
            draw_curves(self.output_dir)

    def on_evaluate(self, args, state, control, **kwargs):
        """Draw anew where training has ended."""
        if self.ended:
            self.on_train_end(args, state, control, **kwargs)
