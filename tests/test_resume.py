"""A run that is killed and started again ends in the weights of one that was not."""

import json
import random
import shutil
import time

import pytest
import torch
from conftest import ROOT
from processes import PRETRAIN, STEPS, Processes
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    Trainer,
    TrainerState,
    TrainingArguments,
)

import stages
from pretrain.checkpoints import (
    WholeCheckpoints,
    check_saved_weights,
    fit_sharding,
    save_model,
)
from pretrain.modeling_gpt import GPT2LMHeadModel

ZERO2 = {"deepspeed": ROOT / "configs/deepspeed/zero2.json"}
HALVES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
QUARTERS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}

# Without dropout and in fp32: what is left is the order of the sums.
EXACT = {"bf16": "false", "config_overrides": '{"n_layer": 2, "n_embd": 32, "n_head": 2}'}
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}  # of weights up to 1.1; 2e-5 was measured


def pretrain(blocks_dir, output_dir, ranks=1, **settings):
    settings = PRETRAIN | {"data_dir": blocks_dir, "output_dir": output_dir} | settings
    return Processes("pretrain.train", settings, ranks)


def weights(directory):
    return load_file(directory / "model.safetensors")


def assert_same_weights(directory, other):
    ours, theirs = weights(directory), weights(other)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def assert_close(directory, other):
    """Equal but for fp32 rounding, which AdamW's division by small numbers makes larger.

    The losses (about 5.8 to 3.2 nats) agree to 1e-5, the weights to 1e-4, after 15 steps.
    """
    for (step, ours), (_, theirs) in zip(losses(directory), losses(other), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5), step
    ours, theirs = weights(directory), weights(other)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **TOLERANCE, msg=name)


def losses(directory):
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {"optimizer": "muon"}),
        (1, {"optimizer": "adamw"} | HALVES),
        (2, {"optimizer": "muon"} | QUARTERS),
        (2, ZERO2 | QUARTERS),
    ],
    ids=["muon", "adamw-accumulated", "muon-two-ranks", "zero2"],
)
def test_a_killed_run_ends_in_the_same_weights(blocks_dir, tmp_path, ranks, settings):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pretrain(blocks_dir, whole, ranks, **settings).finish()
    at_six = killed / "checkpoint-6" / stages.WHOLE
    assert pretrain(blocks_dir, killed, ranks, **settings).kill(at_six.is_file), "too late"
    record = pretrain(blocks_dir, killed, ranks, **settings).finish()
    assert len(record["resumed_from"]) == 1 and "checkpoint-" in record["resumed_from"][0]
    assert_same_weights(whole, killed)
    assert losses(whole) == losses(killed) and len(losses(whole)) == STEPS
    ends = [one / f"checkpoint-{STEPS}" for one in (whole, killed)]
    for name in sorted(path.name for path in ends[0].glob("rng_state*.pth")) + ["scheduler.pt"]:
        first, second = (torch.load(end / name, weights_only=False) for end in ends)
        assert str(first) == str(second), name


@pytest.fixture(scope="module")
def finished(blocks_dir, tmp_path_factory):
    """The directory of an uninterrupted run of 8 blocks a step in one process, in fp32."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(blocks_dir, directory, **EXACT).finish()
    return directory


def test_a_run_killed_in_its_final_saving_is_repaired(finished, blocks_dir):
    whole = finished.parent / "copy"
    shutil.copytree(finished, whole)
    # As a kill leaves it: unfinished, half a file in place and half a directory beside it.
    record = stages.read_json(finished / "run.json")
    stages.write_json(finished / "run.json", record | {"finished": False})
    model = finished / "model.safetensors"
    model.write_bytes(model.read_bytes()[:1000])
    (finished / stages.BESIDE).mkdir()
    (finished / stages.BESIDE / "model.safetensors").write_bytes(b"half")
    (finished / "eval.json").unlink()
    record = pretrain(blocks_dir, finished, **EXACT).finish()
    assert record["resumed_from"] == [str(finished / f"checkpoint-{STEPS}")]
    assert_same_weights(whole, finished)  # transformers would take a step more
    assert losses(whole) == losses(finished)
    assert (finished / "eval.json").read_text() == (whole / "eval.json").read_text()
    assert not (finished / stages.BESIDE).exists()


@pytest.mark.parametrize(
    ("ranks", "division"), [(1, HALVES), (2, QUARTERS)], ids=["2x4-accumulated", "2-ranks-2x2"]
)
def test_the_division_of_a_batch_does_not_matter(finished, blocks_dir, tmp_path, ranks, division):
    divided = tmp_path / "divided"
    process = pretrain(blocks_dir, divided, ranks, **EXACT | division)
    process.finish()
    assert_close(finished, divided)
    for noise in ("[transformers]", "find_unused_parameters"):
        assert noise not in process.output(), "each process prints, or DDP searches at each step"


def test_a_run_goes_on_with_other_processes(finished, blocks_dir, tmp_path):
    moved = tmp_path / "moved"
    divided = EXACT | QUARTERS
    for ranks, settings, step in ((1, EXACT, 3), (2, divided, 6)):
        written = moved / f"checkpoint-{step}" / stages.WHOLE
        assert pretrain(blocks_dir, moved, ranks, **settings).kill(written.is_file), "too late"
    # The words of the last command with another number of processes would be another batch.
    process = pretrain(blocks_dir, moved, **divided)
    process.ranks[0].join()
    assert process.ranks[0].exitcode == 1
    assert "the interrupted run took 8 examples a step" in process.output()
    record = pretrain(blocks_dir, moved, **EXACT).finish()
    assert len(record["resumed_from"]) == 2
    assert_close(finished, moved)


def test_zero_checkpoints_say_where_they_fit(tmp_path):
    class Args:
        world_size = 2

    class PlainTrainer:
        args = Args()
        accelerator = type("A", (), {"state": type("S", (), {"deepspeed_plugin": None})})

    stages.write_json(tmp_path / stages.WHOLE, {"zero_stage": 0, "processes": 1})
    fit_sharding(tmp_path, PlainTrainer)
    stages.write_json(tmp_path / stages.WHOLE, {"zero_stage": 2, "processes": 2})
    with pytest.raises(ValueError, match="ZeRO stage 2, this is stage 0"):
        fit_sharding(tmp_path, PlainTrainer)


def test_saved_weights_are_compared_with_the_live_ones(tiny_config, tmp_path):
    model = GPT2LMHeadModel(tiny_config)
    model.save_pretrained(tmp_path)
    check_saved_weights(model, tmp_path)
    path, name = tmp_path / "model.safetensors", "transformer.h.1.mlp.c_fc.weight"
    saved = load_file(path)
    damaged = saved[name].clone()
    damaged[3, 5] = torch.nextafter(damaged[3, 5], torch.tensor(9.0))  # the last bit of one
    for tensors, message in (
        (saved | {name: damaged}, f"{name} differs .1 of"),
        ({k: v for k, v in saved.items() if k != name}, f"{name} is missing"),
        (saved | {"other": damaged}, "other is unknown"),
    ):
        save_file(tensors, path)
        with pytest.raises(RuntimeError, match=message):
            check_saved_weights(model, tmp_path)


@pytest.mark.parametrize("model_type", ["gpt_neox", "mixtral"])
def test_files_with_other_names_than_the_model_has_are_compared(model_type, tmp_path):
    """transformers renames, splits and stacks weights of some architectures as it loads them."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 8}
    shared = {"num_key_value_heads": 2} if model_type == "mixtral" else {}
    config = AutoConfig.for_model(model_type, **sizes, **shared, intermediate_size=32)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    check_saved_weights(model, tmp_path)
    path = tmp_path / "model.safetensors"
    saved = load_file(path)
    assert saved.keys() != dict(model.named_parameters()).keys()
    name = next(name for name in saved if name not in dict(model.named_parameters()))
    save_file(saved | {name: saved[name] + 1}, path)
    with pytest.raises(RuntimeError, match=f"{name} differs .1 of"):
        check_saved_weights(model, tmp_path)


def test_a_damaged_save_fails_the_run(tmp_path, monkeypatch):
    """Through the trainer: what save_model wrote is damaged behind its back."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=1, vocab_size=8))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], save_total_limit=1)
    trainer = Trainer(model=model, args=args)
    save_model(trainer)
    intact = (tmp_path / "model.safetensors").read_bytes()

    def save_noise(directory):
        model.save_pretrained(directory)
        path = next(stages.Path(directory).glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-8] + b"\x01\x02\x03\x04\x05\x06\x07\x08")

    monkeypatch.setattr(trainer, "save_model", save_noise)
    with pytest.raises(RuntimeError, match="does not hold the weights that are in memory"):
        save_model(trainer)
    assert (tmp_path / "model.safetensors").read_bytes() == intact
    callback, state = WholeCheckpoints(trainer, None), TrainerState(global_step=5)
    save_noise(tmp_path / "checkpoint-5")
    with pytest.raises(RuntimeError, match="checkpoint-5 does not hold"):
        callback.on_save(args, state, None, model=model)
    assert not stages.is_whole(tmp_path / "checkpoint-5")


def test_checkpoints_without_the_optimizer_are_refused(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=1, vocab_size=8))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], save_only_model=True)
    with pytest.raises(ValueError, match="save_only_model: the optimizer's states would be miss"):
        WholeCheckpoints(Trainer(model=model, args=args), None)


def test_older_checkpoints_go_when_the_new_one_is_whole_and_the_best_stays(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=1, vocab_size=8))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], save_total_limit=1)
    trainer = Trainer(model=model, args=args)
    callback = WholeCheckpoints(trainer, None)
    assert args.save_total_limit is None  # transformers would remove the old one too early

    def names():
        return sorted(path.name for path in tmp_path.glob("checkpoint-*"))

    for step, best in ((2, 2), (10, 2), (12, 2)):
        state = TrainerState(global_step=step)
        state.best_model_checkpoint = str(tmp_path / f"checkpoint-{best}")
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
        older = names()
        callback.on_save(args, state, None, model=model)
        assert older == sorted({*older, f"checkpoint-{step}"})
    assert names() == ["checkpoint-12", "checkpoint-2"]


def test_sft_with_lora_dropout_is_resumed_exactly(base_dir, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"{i} + {i}?"},
                          {"role": "assistant", "content": f"It is {2 * i}."}]}
            for i in range(40)]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model_name_or_path": base_dir, "data_files": data, "validation_files": data,
        "use_peft": "true", "lora_r": 4, "lora_dropout": 0.1, "max_length": 64, "max_steps": 9,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 2,
        "logging_steps": 1, "learning_rate": 1e-2,
    }  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    Processes("sft.train", settings | {"output_dir": whole}).finish()
    process = Processes("sft.train", settings | {"output_dir": killed})
    assert process.kill((killed / "checkpoint-4" / stages.WHOLE).is_file), "too late"
    record = Processes("sft.train", settings | {"output_dir": killed}).finish()
    assert len(record["resumed_from"]) == 1
    assert_same_weights(whole, killed)
    assert losses(whole) == losses(killed)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_no_moment_loses_a_run(blocks_dir, tmp_path, ranks):
    """Saves after every step and kills at random moments, most of them inside of a saving."""
    settings = PRETRAIN | {"save_steps": 1, "max_steps": 40, "save_total_limit": 1}
    settings |= {"data_dir": blocks_dir, "optimizer": "muon", "per_device_train_batch_size": 4}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    Processes("pretrain.train", settings | {"output_dir": whole}, ranks).finish()
    moments, kills, half_written, furthest = random.Random(0), 0, 0, 0
    while kills < 24:
        process = Processes("pretrain.train", settings | {"output_dir": killed}, ranks)
        before, known = furthest, set(killed.glob("checkpoint-*"))
        while process.alive() and not set(killed.glob("checkpoint-*")) - known:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.15))
        if not process.kill(lambda: True):
            assert process.finish()["finished"]
            assert_same_weights(whole, killed)  # ended: from the beginning again
            furthest = 0
            shutil.rmtree(killed)
            continue
        kills += 1
        steps = [int(path.name.split("-")[1]) for path in stages.list_checkpoints(killed)]
        half_written += len(list(killed.glob("checkpoint-*"))) > len(steps)
        assert not before or steps and max(steps) >= before, "the last whole checkpoint is gone"
        furthest = max(steps, default=0)
    assert half_written >= 3, half_written
    Processes("pretrain.train", settings | {"output_dir": killed}, ranks).finish()
    assert_same_weights(whole, killed)
    assert losses(whole) == losses(killed)
