"""The guards while a policy is trained: what counts as a fall, and which checkpoint is kept."""

import json

import pytest
import torch
from conftest import quick_arguments
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

import rlhf.guards
import stages
from pretrain.callbacks import watch
from pretrain.checkpoints import save_model, train_or_resume
from rlhf.guards import describe_falls, find_falls, report_falls, watch_guards, wrap


def values(**guards):
    return {name: metric | {"n": 100} for name, metric in wrap(guards).items()}


@pytest.mark.parametrize(
    ("name", "before", "after", "fall"),
    [
        ("stop_rate", 0.8, 0.6, 0.25),
        ("task_accuracy", 0.5, 0.6, None),
        ("fact_accuracy", 0.0, 0.0, None),  # there is nothing to lose
        ("repetition", 0.2, 0.3, 0.5),
        ("repetition", 0.001, 0.003, None),  # noise, not three times worse
        ("length", 10.0, 90.0, None),  # neither good nor bad
        ("bits_per_byte", 2.0, 2.5, 0.25),
        ("bits_per_byte", 2.0, 1.5, None),
    ],
)
def test_a_fall_is_relative_to_what_there_was(name, before, after, fall):
    falls = find_falls(values(**{name: before}), values(**{name: after}))
    assert falls == pytest.approx({name: fall} if fall else {})


def test_five_per_cent_is_allowed():
    before = values(stop_rate=1.0, language_match=1.0, bits_per_byte=1.0, length=10)
    after = values(stop_rate=0.95, language_match=0.94, bits_per_byte=1.06, length=90)
    falls = find_falls(before, after)
    assert falls == pytest.approx({"language_match": 0.06, "bits_per_byte": 0.06})
    assert describe_falls(before, after) == (
        "bits_per_byte 1.000 -> 1.060 (6.0% lost), language_match 1.000 -> 0.940 (6.0% lost)"
    )


def test_a_stage_is_compared_with_what_it_started_from(tmp_path):
    stages.write_json(tmp_path / "eval.json", values(stop_rate=1.0, language_match=1.0))
    after = values(stop_rate=0.8, language_match=1.0, **{"reward_score/gain": 0.5})
    sentence = report_falls(tmp_path, after)
    assert "stop_rate 1.000 -> 0.800 (20.0% lost)" in sentence
    assert sentence.endswith("while the reward model's score rose (0.000 -> 0.500)")
    after["stop_rate"]["n"] = 50  # other rows: not comparable
    assert report_falls(tmp_path, after) == "" == report_falls(None, after)


class RewardedTrainer(Trainer):
    """Logs a reward, as a policy's trainer does."""

    def log(self, logs, *args, **kwargs):
        super().log(logs | {"reward": 0.1 * self.state.global_step}, *args, **kwargs)


def train(base_dir, tokenizer, output_dir, stop_rates, monkeypatch, **changes):
    """A run of 8 steps that saves every 2; the guards are as written down: start, 2, 4, 6, 8."""
    rates = iter(stop_rates)

    def measure(model, tokenizer, args):
        assert not model.training and args.max_rows == 64
        return values(stop_rate=next(rates), length=9.0), []

    monkeypatch.setattr(rlhf.guards, "evaluate_chat", measure)
    config = output_dir.parent / "eval.yaml"
    held_out = output_dir.parent / "x.jsonl"
    held_out.write_text("{}\n")
    config.write_text(f"chat_files: {held_out}\n")
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(9, 300, (16, 8)).tolist()]
    changes = {"max_steps": 8, "save_steps": 2, "save_total_limit": 1, "bf16": False} | changes
    args = quick_arguments(output_dir, learning_rate=1e-2, **changes)
    run = stages.start_run("dpo", output_dir, [args])
    trainer = RewardedTrainer(
        model=AutoModelForCausalLM.from_pretrained(base_dir),
        args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        eval_dataset=Dataset.from_list(rows[:2]),
    )  # fmt: skip
    watch(trainer, *watch_guards(trainer, str(config), run))
    train_or_resume(trainer, run)
    save_model(trainer)
    run.finish()
    return json.loads((output_dir / "run.json").read_text())["guards"]


@pytest.mark.parametrize(
    ("stop_rates", "kept", "said"),
    [
        ([0.9, 0.9, 0.88, 0.9, 0.87], 8, "the output is checkpoint-8, the last one; guards hold"),
        ([0.9, 0.9, 0.88, 0.5, 0.4], 4, "checkpoint-4, not checkpoint-8: the newest whose guards"),
        ([0.9, 0.5, 0.7, 0.6, 0.6], 8, "checkpoint-8, the last one, though guards fell"),
        ([0.9, 0.5, 0.6, 0.7, 0.8], 8, "checkpoint-8, the last one, though guards fell"),
    ],
)
def test_the_newest_checkpoint_whose_guards_hold_is_the_output(
    base_dir, tokenizer, tmp_path, monkeypatch, capsys, stop_rates, kept, said
):
    output = tmp_path / "dpo"
    record = train(base_dir, tokenizer, output, stop_rates, monkeypatch)
    shown = capsys.readouterr().out
    assert said in shown
    assert record["checkpoint"] == f"checkpoint-{kept}"
    assert record["after"]["stop_rate"] == stop_rates[kept // 2]
    # It is on the disk beside the newest, and its weights are the output's.
    left = sorted(path.name for path in output.glob("checkpoint-*"))
    assert left == sorted({f"checkpoint-{kept}", "checkpoint-8"})
    ours, theirs = (load_file(d / "model.safetensors") for d in (output, output / left[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    fell = [line for line in shown.splitlines() if "guards at step" in line]
    assert len(fell) == sum(rate < 0.95 * 0.9 for rate in stop_rates[1:])
    if stop_rates[3] == 0.5:
        reward = "while the reward rose (0.100 -> 0.550)"
        assert fell[0].endswith(f"0.900 -> 0.500 (44.4% lost), {reward}")
    lines = [json.loads(line) for line in (output / "guards.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]


def test_what_was_measured_before_an_interruption_still_counts(
    base_dir, tokenizer, tmp_path, monkeypatch
):
    output = tmp_path / "dpo"

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(rlhf.guards.Guards, "on_train_end", interrupt)
    with pytest.raises(KeyboardInterrupt):  # after the last saving, before the output is written
        train(base_dir, tokenizer, output, [0.9, 0.9, 0.5, 0.4, 0.4], monkeypatch)
    monkeypatch.undo()
    record = train(base_dir, tokenizer, output, [], monkeypatch)  # measures nothing any more
    assert (record["checkpoint"], record["last_checkpoint"]) == ("checkpoint-2", "checkpoint-8")
    ours, theirs = (load_file(d / "model.safetensors") for d in (output, output / "checkpoint-2"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_ways_to_pick_a_checkpoint_are_one_too_many(base_dir, tokenizer, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="load_best_model_at_end picks a checkpoint by its loss"):
        train(
            base_dir, tokenizer, tmp_path / "dpo", [], monkeypatch,
            load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        )  # fmt: skip
