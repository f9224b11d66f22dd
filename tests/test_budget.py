"""How long a run goes on: early stopping with the best weights, and `--minutes`."""

import json
import math

import pytest
import torch
from conftest import Clock, pretrain, quick_arguments, read_lines
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from pretrain import train as pretrain_train
from pretrain.budget import UNKNOWN_STEPS, Budget, choose_steps, plan_steps
from pretrain.callbacks import EarlyStopping, watch
from pretrain.data import PackedCollator, load_blocks
from pretrain.hardware import training_defaults
from pretrain.modeling_gpt import GPT2LMHeadModel


@pytest.fixture(autouse=True)
def say_little(monkeypatch):
    """Samples take most of the time of so small a run."""
    monkeypatch.setattr("pretrain.monitors.SAMPLE_TOKENS", 2)
    monkeypatch.setattr(pretrain_train, "SAMPLE_PROMPTS", ())


class EvaluationGetsWorse(TrainerCallback):
    """Spoils the weights a little after every step, so that each evaluation is worse."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step > 4:
            with torch.no_grad():
                model.transformer.wte.weight.mul_(3.0)


BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
    "load_best_model_at_end": True, "max_steps": 40, "learning_rate": 1e-3,
}  # fmt: skip


def test_pretraining_ends_early_with_the_best_weights(prepared_dir, tmp_path, monkeypatch):
    original = pretrain_train.watch_pretraining

    def spoil(trainer, args):
        trainer.add_callback(EvaluationGetsWorse())
        return original(trainer, args)

    monkeypatch.setattr(pretrain_train, "watch_pretraining", spoil)
    lines = pretrain(prepared_dir, tmp_path, {"early_stopping_patience": 2}, **BEST)
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(losses) == [2, 4, 6, 8], "two evaluations without a better one"
    assert min(losses, key=losses.get) == 4
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    blocks = load_blocks(prepared_dir, "validation")["input_ids"]
    with torch.no_grad():
        loss = model(**PackedCollator(2)([{"input_ids": row} for row in blocks])).loss
    assert loss.item() == pytest.approx(losses[4], abs=0.02)


def test_fine_tuning_ends_early_with_the_best_weights(base_dir, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM
    from trl import ModelConfig, SFTConfig

    from sft import train

    turns = [("user", "Who are you?"), ("assistant", "A mill.")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 24)
    original, kept = train.watch, {}

    class Keep(EvaluationGetsWorse):
        def on_save(self, args, state, control, model=None, **kwargs):
            kept[state.global_step] = model.transformer.wte.weight.detach().clone()

    monkeypatch.setattr(train, "watch", lambda trainer, **words: original(trainer, Keep(), **words))
    monkeypatch.setattr(train, "evaluate_stage", lambda *args: {})
    args = train.SFTArguments(
        [str(tmp_path / "rows.jsonl")], [str(tmp_path / "rows.jsonl")], early_stopping_patience=1
    )
    given = training_defaults() | {"use_cpu": True, "report_to": [], "disable_tqdm": True} | BEST
    given |= {"output_dir": str(tmp_path / "sft"), "max_length": 64, "logging_steps": 1}
    main_args = (args, SFTConfig(**given), ModelConfig(model_name_or_path=str(base_dir)))
    train.main(*main_args)
    lines = read_lines(tmp_path / "sft/metrics.jsonl")
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[0] > losses[1] < losses[2] and not losses[3:]
    measured = json.loads((tmp_path / "sft/eval.json").read_text())["loss"]["value"]
    assert measured == pytest.approx(losses[1], rel=1e-3)  # another batch, in bf16
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").transformer.wte.weight
    assert torch.equal(saved, kept[4]) and not torch.equal(saved, kept[6])


def test_early_stopping_counts_on_after_a_resume(tmp_path):
    args = quick_arguments(tmp_path, **BEST)
    for losses, count, stops in (([3, 2, 2.5, 2.1], 2, False), ([3, 1, 2, 2, 2], 3, True)):
        stopping, control = EarlyStopping(3), TrainerControl()
        state = TrainerState(log_history=[{"eval_loss": loss} for loss in losses])
        stopping.on_train_begin(args, state, control)
        assert (stopping.early_stopping_patience_counter, control.should_training_stop) == (
            count,
            stops,
        )


def test_the_best_weights_need_a_checkpoint_of_each_evaluation(tmp_path, tiny_config):
    trainer = Trainer(GPT2LMHeadModel(tiny_config), quick_arguments(tmp_path))
    with pytest.raises(ValueError, match="early_stopping_patience is 2.*load_best_model_at_end"):
        watch(trainer, early_stopping_patience=2)
    trainer.args = quick_arguments(tmp_path, **BEST)
    with pytest.raises(ValueError, match="early_stopping_patience is 0.*end with its first step"):
        watch(trainer, early_stopping_patience=0)
    trainer.args = quick_arguments(tmp_path, **BEST | {"save_steps": 4})
    with pytest.raises(ValueError, match="save_steps is 4, eval_steps 2"):
        watch(trainer)


def test_the_worst_weights_are_not_the_best(tmp_path, tiny_config):
    by_bits = BEST | {"metric_for_best_model": "bits_per_byte"}
    trainer = Trainer(GPT2LMHeadModel(tiny_config), quick_arguments(tmp_path))
    trainer.args = quick_arguments(tmp_path, **by_bits)
    assert trainer.args.greater_is_better, "transformers' guess, which the error is about"
    with pytest.raises(ValueError, match="of bits_per_byte the highest.*greater_is_better: false"):
        watch(trainer)
    trainer.args = quick_arguments(tmp_path, **by_bits, greater_is_better=False)
    watch(trainer)


# --minutes


def test_steps_are_what_fits_beside_evaluations_and_checkpoints():
    assert choose_steps(100, 0.5, {}, 0) == 200
    assert choose_steps(100, 0.5, {10: 5.0}, 0) == 100
    assert choose_steps(100, 0.5, {10: 5.0, 20: 10.0}, 25) == 50
    assert choose_steps(3, 0.5, {}, 60) == 1


class Ticks(TrainerCallback):
    """Moves the clock: 4 s for a slow step, 2 s for others, 6 s to evaluate, 3 s to save."""

    def __init__(self, clock, slow=2):
        self.clock, self.slow, self.evaluations, self.rates = clock, slow, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.clock.now += 4 if state.global_step < self.slow else 2

    def on_evaluate(self, args, state, control, **kwargs):
        self.clock.now += 6
        self.evaluations.append(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self.clock.now += 3

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.fixture
def timed(monkeypatch):
    """A function that makes pretraining tell the time by a `Ticks` that it returns."""

    original = pretrain_train.watch_pretraining

    def install():
        clock = Clock()
        ticks = Ticks(clock)

        def watch_pretraining(trainer, args):
            trainer.add_callback(ticks)
            return original(trainer, args)

        monkeypatch.setattr(pretrain_train, "watch_pretraining", watch_pretraining)
        monkeypatch.setattr(pretrain_train, "Budget", lambda minutes: Budget(minutes, clock))
        return ticks

    return install


MINUTES = {
    "eval_strategy": "steps", "eval_steps": 10, "save_strategy": "steps", "save_steps": 15,
    "save_total_limit": None, "learning_rate": 1e-2, "lr_scheduler_type": "linear",
    "warmup_steps": 0.4, "max_steps": 3000,
}  # fmt: skip


def test_minutes_choose_the_steps_and_the_schedule_ends_there(prepared_dir, tmp_path, timed):
    ticks = timed()
    lines = pretrain(prepared_dir, tmp_path, {"minutes": 2.0}, **MINUTES)
    record = json.loads((tmp_path / "run.json").read_text())
    # 8 s of slow steps + 9 s of measured evaluation and checkpoint + 5 timed steps and the one
    # in which it is decided, 12 s: 91 s are left; 9 s are kept for the end.
    steps = 8 + math.floor((120 - 29 - 9) / (2 + 6 / 10 + 3 / 15))
    assert record["steps"] == steps == len(ticks.rates) == 37
    assert 114 <= ticks.clock.now - 100 <= 120
    assert ticks.evaluations == [2, 10, 20, 30, 37]
    warmup = math.ceil(0.4 * steps)
    for step in (8, 20, 36):  # lr is that of a plain linear schedule of so many steps
        expected = step / warmup if step < warmup else (steps - step) / (steps - warmup)
        assert ticks.rates[step] == pytest.approx(1e-2 * expected), step
    assert max(ticks.rates[:8]) < 1e-6
    ended = next(line for line in lines if "train_samples_per_second" in line)
    rate = ended["train_samples_per_second"] / ended["train_steps_per_second"]
    assert rate == pytest.approx(4, rel=0.01)


def test_evaluations_and_checkpoints_of_epochs_are_in_the_minutes(prepared_dir, tmp_path, timed):
    ticks = timed()
    by_epoch = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    pretrain(prepared_dir, tmp_path, {"minutes": 2.0}, **MINUTES | by_epoch)
    epoch = math.ceil(len(load_blocks(prepared_dir, "train")) / 4)
    assert ticks.evaluations[:3] == [2, epoch, 2 * epoch]
    assert 111 <= ticks.clock.now - 100 <= 129  # to one evaluation and its checkpoint, 9 s


def test_the_decay_may_be_a_share_also_of_the_steps_that_minutes_hold(
    prepared_dir, tmp_path, timed
):
    schedule = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 0.1}
    with pytest.raises(ValueError, match="warmup_stable_decay needs its decay"):
        pretrain(prepared_dir, tmp_path, {}, **MINUTES | schedule)
    schedule["lr_scheduler_kwargs"] = {"num_decay_steps": 0.5, "decay_type": "linear"}
    ticks = timed()
    pretrain(prepared_dir, tmp_path, {"minutes": 2.0}, **MINUTES | schedule)
    steps = len(ticks.rates)
    decay = math.ceil(0.5 * steps)
    assert steps == 37
    assert ticks.rates[10 : steps - decay + 1] == pytest.approx([1e-2] * (steps - decay - 9))
    assert ticks.rates[-1] == pytest.approx(1e-2 / decay)
    assert quick_arguments(tmp_path, **schedule).lr_scheduler_kwargs["num_decay_steps"] == 0.5


def test_a_resumed_run_keeps_the_number_of_steps(prepared_dir, tmp_path, timed, monkeypatch):
    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 20:
                raise Killed

    ticks, whole = timed(), tmp_path / "whole"
    pretrain(prepared_dir, whole, {"minutes": 2.0}, **MINUTES)
    rates, made = ticks.rates, json.loads((whole / "run.json").read_text())

    ticks, original = timed(), pretrain_train.watch_pretraining
    monkeypatch.setattr(
        pretrain_train,
        "watch_pretraining",
        lambda trainer, args: trainer.add_callback(Kill()) or original(trainer, args),
    )
    cut = tmp_path / "cut"
    with pytest.raises(Killed):
        pretrain(prepared_dir, cut, {"minutes": 2.0}, **MINUTES)
    monkeypatch.setattr(pretrain_train, "watch_pretraining", original)
    ticks.slow, ticks.rates = 99, []  # now every step would be slow
    pretrain(prepared_dir, cut, {"minutes": 2.0}, **MINUTES)
    again = json.loads((cut / "run.json").read_text())
    assert again["resumed_from"] == [str(cut / "checkpoint-15")]
    assert (again["steps"], ticks.rates) == (made["steps"], rates[15:])
    assert again["outputs"]["model.safetensors"] == made["outputs"]["model.safetensors"]


def test_minutes_need_time_and_a_schedule_with_an_end(tmp_path):
    args = quick_arguments(tmp_path)
    plan_steps(args, 1.5, None)
    assert args.max_steps == UNKNOWN_STEPS
    with pytest.raises(ValueError, match="minutes is 0: give a positive number"):
        plan_steps(args, 0, None)
    with pytest.raises(ValueError, match="minutes is nan: give a positive number"):
        plan_steps(args, math.nan, None)
    plateau = quick_arguments(
        tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch"
    )
    with pytest.raises(
        ValueError, match="not reduce_lr_on_plateau: set lr_scheduler_type to cosine"
    ):
        plan_steps(plateau, 1, None)
