"""What a run shows and writes while it trains, and what stops it."""

import functools
import importlib.util
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import Clock, pretrain, quick_arguments, read_lines
from datasets import Dataset
from transformers import LlamaConfig, Trainer
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import TrainerControl, TrainerState

from pretrain import costs
from pretrain.callbacks import (
    EventFiles,
    MetricsFile,
    PlainProgress,
    StopOnNaN,
    Throughput,
    show_duration,
)
from pretrain.curves import draw_curves, smooth
from pretrain.data import load_blocks
from pretrain.hardware import training_defaults
from pretrain.modeling_gpt import GPT2LMHeadModel
from pretrain.monitors import HeldOut, LossGuard, Samples, count_predicted


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return GPT2LMHeadModel(tiny_config)


# costs


def test_flops_of_a_token_are_those_counted_by_hand(tiny_config):
    matrices = 2 * 12 * 64 * 64 + tiny_config.vocab_size * 64
    assert costs.flops_per_token(tiny_config, 48) == 6 * matrices + 12 * 2 * 64 * 48
    llama = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=100, tie_word_embeddings=False,
    )  # fmt: skip
    matrices = 3 * (2 * 64 * 32 + 2 * 64 * 16 + 3 * 64 * 96) + 100 * 64
    assert costs.flops_per_token(llama, 10) == 6 * matrices + 12 * 3 * 32 * 10


def test_peak_is_the_rate_of_the_fastest_product():
    # Begin; then the start and the end of each product; after the fifth, whether time is over.
    ticks = [0, 0.01, 0.05, 0.06, 0.10, 0.11, 0.13, 0.2, 0.23, 0.24, 0.28, 0.29, 0.29, 0.30, 0.31]
    peak = costs.measure_peak(torch.device("cpu"), torch.float32, iter(ticks).__next__)
    assert peak == pytest.approx(2 * 1024**3 / 0.01)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 1.0),  # not in the table: measured
    ],
)
def test_known_cards_have_their_data_sheets_peak(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(costs, "measure_peak", lambda device, dtype: 1.0)
    assert costs.peak_flops(torch.device("cuda"), torch.bfloat16) == peak


# speed and progress


def test_throughput_leaves_out_evaluations_and_saves(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.callbacks.peak_flops", lambda device, dtype: 4000.0)
    clock, state, args = Clock(), TrainerState(), quick_arguments(tmp_path)
    throughput = Throughput(lambda: 100 * state.global_step, flops_per_token=8, clock=clock)
    throughput.on_train_begin(args, state, None)
    for step in (1, 2, 3):
        clock.now += 0.5
        state.global_step = step
        throughput.on_step_end(args, state, None)
        if step == 2:
            clock.now += 70
            throughput.on_evaluate(args, state, None)
            clock.now += 5
            throughput.on_save(args, state, None)
    logs = {"loss": 1.0}
    throughput.on_log(args, state, None, logs=logs)
    assert logs["tokens_per_second"] == pytest.approx(200)
    assert logs["mfu"] == pytest.approx(200 * 8 / 4000)
    held_out = {"eval_loss": 1.0}
    throughput.on_log(args, state, None, logs=held_out)
    assert held_out == {"eval_loss": 1.0}


@pytest.mark.parametrize("spare", [-500, 1])
def test_the_tokens_of_smaller_batches_are_those_that_are_there(
    prepared_dir, tmp_path, monkeypatch, spare
):
    counts = []

    def make_throughput(count_tokens, cost):
        counts.append(count_tokens)
        return Throughput(count_tokens, cost)

    monkeypatch.setattr("pretrain.train.Throughput", make_throughput)
    rows = len(load_blocks(prepared_dir, "train"))
    size = {"per_device_train_batch_size": rows - spare, "max_steps": 3, "save_strategy": "no"}
    pretrain(prepared_dir, tmp_path, **size)
    assert counts[0]() == 32 * (3 * rows if spare < 0 else 2 * (rows - 1) + 1)


def test_throughput_of_trl_trainers_is_read_off_their_token_count(tmp_path):
    clock, state, args = Clock(), TrainerState(global_step=7), quick_arguments(tmp_path)
    throughput = Throughput(clock=clock)
    throughput.on_train_begin(args, state, None)
    rates = []
    for step, tokens in ((8, 5000), (9, 5600)):
        clock.now += 2
        state.global_step = step
        throughput.on_step_end(args, state, None)
        logs = {"loss": 1.0, "num_tokens": tokens}
        throughput.on_log(args, state, None, logs=logs)
        rates.append(logs.get("tokens_per_second"))
    assert rates == [None, 300], "how many of the 5000 are of this process is not known"


def test_ten_lines_a_run_without_a_terminal(tmp_path, capsys):
    clock, state, args = Clock(), TrainerState(max_steps=200), quick_arguments(tmp_path)
    shown = PlainProgress(clock)
    shown.on_train_begin(args, state, None)
    for step in range(1, 201):
        clock.now += 60 if step == 1 else 2
        state.global_step = step
        shown.on_step_end(args, state, None)
        logs = {"loss": 2.0, "tokens_per_second": 12345.6, "mfu": 0.456}
        shown.on_log(args, state, None, logs=logs)
    shown.on_log(args, state, None, logs={"eval_loss": 2.5, "eval_perplexity": 12.18})
    shown.on_log(args, state, None, logs={"train_runtime": 9.0, "train_loss": 3.0})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert lines[0] == (
        "  step 20/200: loss 2.000, 12,346 tokens/s, MFU 46%, ETA 6 min 00 s"
    )  # 180 steps of 2 s; the slow first step does not count
    assert lines[9] == "  step 200/200: loss 2.000, 12,346 tokens/s, MFU 46%"
    assert lines[10] == "  step 200/200: held-out loss 2.500, perplexity 12.18"


def test_durations_are_shown_in_two_units():
    assert [show_duration(s) for s in (4.6, 243, 7500)] == ["5 s", "4 min 03 s", "2 h 05 min"]


# files


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    args, file = quick_arguments(tmp_path), MetricsFile(str(tmp_path))
    file.path.write_text("".join(f'{{"step": {s}, "loss": 1.0}}\n' for s in (2, 4, 6)))
    file.on_train_begin(args, TrainerState(global_step=4), None)
    file.on_log(args, TrainerState(global_step=6), None, logs={"loss": math.nan, "n": 3})
    lines = read_lines(file.path)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert (lines[2]["loss"], lines[2]["n"]) == (None, 3)
    file.on_train_begin(args, TrainerState(), None)
    assert file.path.read_text() == ""


def test_resumed_event_files_void_the_steps_behind_the_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def log(first, values):
        events = EventFiles(str(tmp_path))
        events.on_train_begin(quick_arguments(tmp_path), TrainerState(global_step=first), None)
        for step, loss in values:
            events.on_log(None, TrainerState(global_step=step), None, logs={"loss": loss})
        events.on_train_end(None, None, None)
        read = EventAccumulator(str(tmp_path / "runs"))
        read.Reload()
        return [(one.step, round(one.value, 3)) for one in read.Scalars("train/loss")]

    log(0, [(1, 3.0), (2, 2.5), (3, 9.0)])
    assert log(2, [(3, 2.0)]) == [(1, 3.0), (2, 2.5), (3, 2.0)]
    assert log(0, [(1, 7.0)]) == [(1, 7.0)]


@pytest.fixture(scope="module")
def finished(prepared_dir, tmp_path_factory):
    """A short run of pretrain.train with its default reports, and its metrics."""
    output_dir = tmp_path_factory.mktemp("run")
    changes = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    changes["report_to"] = training_defaults()["report_to"]
    return output_dir, pretrain(prepared_dir, output_dir, **changes)


def test_metrics_hold_speed_memory_and_held_out_numbers(finished, prepared_dir, tokenizer):
    output_dir, lines = finished
    training = [line for line in lines if "loss" in line]
    assert len(training) == 4
    record = json.loads((output_dir / "run.json").read_text())
    for line in training:
        rate = line["tokens_per_second"] * record["flops_per_token"]
        assert line["mfu"] == pytest.approx(rate / record["peak_flops_per_second"], 1e-2, 2e-6)
        assert 50e6 < line["peak_memory_bytes"] < 100e9
    tokens, size = count_predicted(load_blocks(prepared_dir, "validation"), tokenizer)
    held_out = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in held_out] == [2, 4]
    for line in held_out:
        assert line["eval_perplexity"] == pytest.approx(math.exp(line["eval_loss"]), rel=1e-4)
        bits = line["eval_loss"] / math.log(2) * tokens / size
        assert line["eval_bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_tensorboard_holds_what_the_callbacks_add(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(finished[0] / "runs"))
    read.Reload()
    tags = read.Tags()
    wanted = {"train/loss", "train/mfu", "train/tokens_per_second", "train/peak_memory_bytes"}
    wanted |= {"eval/loss", "eval/perplexity", "eval/bits_per_byte"}
    assert wanted <= set(tags["scalars"])
    assert "samples/text_summary" in tags["tensors"]


def test_samples_of_every_evaluation_are_kept(finished):
    lines = read_lines(finished[0] / "samples.jsonl")
    assert [line["step"] for line in lines] == [2] * 3 + [4] * 3
    assert all(line["text"].startswith(line["prompt"]) for line in lines)


def test_curves_have_a_panel_for_each_thing_that_was_logged(finished, tmp_path):
    def height(path):
        return int.from_bytes(path.read_bytes()[20:24], "big")

    assert height(finished[0] / "curves.png") == 120 * 4
    lines = [{"step": s, "loss": 0.1, "reward": s, "ppo/kl": s} for s in range(30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert height(draw_curves(tmp_path)) == 120 * 10
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    assert draw_curves(tmp_path) is None


def test_smoothing_does_not_lag():
    assert smooth(tuple(range(100))) == pytest.approx(list(range(100)))
    assert smooth((0.0, 3.0, 0.0, 0.0, 0.0)) == pytest.approx([0.0, 1.0, 1.0, 0.0, 0.0])


@pytest.mark.parametrize("name", ["wandb", "trackio", "swanlab"])
def test_a_reporter_that_is_not_installed_is_refused(name):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    (reporter,) = get_reporting_integration_callbacks([name])
    with pytest.raises(RuntimeError, match=f"(?i){name}.*install"):
        reporter()


def test_deepspeed_finds_the_cpu_without_a_word():
    code = "from pretrain.hardware import quiet_logs; quiet_logs(); import deepspeed"
    code += "; from deepspeed.accelerator import get_accelerator; print(get_accelerator()._name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == ("cuda" if torch.cuda.is_available() else "cpu"), done.stderr
    assert "Setting accelerator" not in done.stdout + done.stderr


# held-out numbers and samples


def test_bits_per_byte_count_what_is_predicted(tokenizer):
    ids = [2, *tokenizer("小河", add_special_tokens=False)["input_ids"], 3, 2]
    ids += tokenizer(" mill", add_special_tokens=False)["input_ids"]
    blocks = Dataset.from_dict({"input_ids": [ids, ids]}).with_format("torch")
    tokens, size = count_predicted(blocks, tokenizer)
    assert tokens == 2 * (len(ids) - 2), "neither the first token nor the second <bos>"
    assert size == 2 * (6 + 5)
    logs = {"eval_loss": 2.0}
    HeldOut(blocks, tokenizer).on_log(None, None, None, logs=logs)
    assert logs["eval_perplexity"] == pytest.approx(math.e**2)
    assert logs["eval_bits_per_byte"] == pytest.approx(2 * math.log2(math.e) * tokens / size)


def test_samples_disturb_neither_random_numbers_nor_the_mode(tmp_path, tiny_config, tokenizer):
    config = type(tiny_config)(**tiny_config.to_dict() | {"resid_pdrop": 0.5})
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    trainer = Trainer(model, quick_arguments(tmp_path))
    samples = Samples(trainer, tokenizer, prompts=("The river", "小河"))

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = states()
    for training in (True, False):
        model.train(training)
        samples.on_evaluate(trainer.args, TrainerState(global_step=5), None, model=model)
        assert model.training is training
    assert states() == before
    lines = read_lines(samples.path)
    assert lines[:2] == lines[2:], "dropout was off in training mode too"
    assert lines[1]["text"].startswith("小河") and len(lines[1]["text"]) > 2


# a loss that is not a number


@pytest.mark.parametrize("immediately", [True, False])
def test_a_broken_loss_names_its_blocks(prepared_dir, model, immediately):
    blocks = load_blocks(prepared_dir, "train")
    guard = LossGuard(str(prepared_dir), blocks)
    fine = torch.stack([blocks[i]["input_ids"] for i in (1, 2)]).long()
    broken = torch.stack([blocks[i]["input_ids"] for i in (23, 4)]).long()
    guard.see(model, torch.tensor(1.0), fine, step=6)
    expected = (
        r"loss is nan at step 7, on blocks 23 \(train-00001.parquet, row 3\), 4 \(train-00000"
    )
    if immediately:
        with pytest.raises(ValueError, match=expected):
            guard.see(model, torch.tensor(math.nan), broken, step=7)
    else:  # as on a GPU, where the losses of several steps wait for the log
        losses = ((6, 1.0, fine), (7, math.nan, broken), (8, math.inf, fine))
        guard.batches = [(step, torch.tensor(loss), ids) for step, loss, ids in losses]
        guard.on_step_end(None, None, TrainerControl(should_log=False), model=model)
        with pytest.raises(ValueError, match=expected):
            guard.on_step_end(None, None, TrainerControl(should_log=True), model=model)


def test_a_broken_weight_is_told_from_broken_data(prepared_dir, model):
    blocks = load_blocks(prepared_dir, "train")
    ids = blocks[0]["input_ids"].unsqueeze(0)
    with pytest.raises(ValueError, match="Look at these blocks"):
        LossGuard(str(prepared_dir), blocks).see(model, torch.tensor(math.inf), ids, step=1)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="h.1.mlp.c_fc.weight first: .* Lower learning_rate"):
        LossGuard(str(prepared_dir), blocks).see(model, torch.tensor(math.inf), ids, step=1)


def test_a_run_stops_at_the_step_whose_loss_breaks(prepared_dir, tmp_path, monkeypatch):
    seen, forward = [], GPT2LMHeadModel.forward

    def break_third(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        seen.append(kwargs["input_ids"])
        if len(seen) == 5:  # the first half of step 3
            output["loss"] = output["loss"] * math.nan
        return output

    monkeypatch.setattr(GPT2LMHeadModel, "forward", functools.wraps(forward)(break_third))
    changes = {"max_steps": 6, "logging_steps": 6, "gradient_accumulation_steps": 2}
    with pytest.raises(ValueError, match="at step 3, on blocks") as error:
        pretrain(prepared_dir, tmp_path, save_strategy="no", **changes)
    blocks = load_blocks(prepared_dir, "train")["input_ids"]
    for row in seen[4].tolist():
        index = next(i for i, block in enumerate(blocks) if block.tolist() == row)
        assert f" {index} (train-0000" in str(error.value)


def test_a_logged_nan_stops_every_stage(tmp_path):
    state = TrainerState(global_step=9)
    with pytest.raises(ValueError, match="loss is nan at step 9. Lower learning_rate"):
        StopOnNaN().on_log(quick_arguments(tmp_path), state, None, logs={"loss": math.nan})
