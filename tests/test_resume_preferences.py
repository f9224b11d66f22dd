"""Reward and DPO in real processes: killed and gone on, on two ranks, under ZeRO-2, with QLoRA."""

import json

import pytest
import torch
from conftest import ROOT
from processes import Processes
from safetensors.torch import load_file

import stages

STEPS = 6
SETTINGS = {
    "bf16": "false", "max_length": 64, "max_steps": STEPS, "save_steps": 2, "logging_steps": 1,
    "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_total_limit": 2,
    "lr_scheduler_type": "cosine", "warmup_steps": 0, "validation_share": 0.2,
}  # fmt: skip
HALVES = {"per_device_train_batch_size": 2}
LORA = {"use_peft": "true", "lora_r": 4, "lora_dropout": 0.0}
QLORA = LORA | {"load_in_4bit": "true", "bf16": "true"}
ZERO2 = {"deepspeed": ROOT / "configs/deepspeed/zero2.json"}
STAGES = ["rlhf.train_reward", "rlhf.train_dpo"]


@pytest.fixture(scope="module")
def settings(base_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"{i} + {i}?", "chosen": f"It is {2 * i}.", "rejected": "The " * (i % 4 + 1)}
        for i in range(40)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SETTINGS | {"model_name_or_path": base_dir, "data_files": path}


def run(module, settings, output_dir, ranks=1, **changes):
    return Processes(module, settings | {"output_dir": output_dir} | changes, ranks)


def weights(directory):
    return load_file(directory / "model.safetensors")


def losses(directory):
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module", params=STAGES)
def alone(request, settings, tmp_path_factory):
    """What one process makes of 4 pairs a step, without an interruption."""
    directory = tmp_path_factory.mktemp("runs") / "alone"
    run(request.param, settings, directory).finish()
    return request.param, directory


def assert_killed_is_whole(module, settings, whole, killed, ranks=1, **changes):
    at_two = killed / "checkpoint-2" / stages.WHOLE
    assert run(module, settings, killed, ranks, **changes).kill(at_two.is_file), "too late"
    record = run(module, settings, killed, ranks, **changes).finish()
    assert len(record["resumed_from"]) == 1
    ours, theirs = weights(killed), weights(whole)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert losses(killed) == losses(whole) and len(losses(whole)) == STEPS
    evaluations = [json.loads((one / "eval.json").read_text()) for one in (killed, whole)]
    assert evaluations[0] == evaluations[1]


def test_a_killed_run_ends_in_the_same_weights(alone, settings, tmp_path):
    module, whole = alone
    assert_killed_is_whole(module, settings, whole, tmp_path / "killed")
    assert not (tmp_path / "killed/pairs").exists()


def test_a_killed_run_goes_on_with_the_reference_that_it_had(settings, tmp_path):
    changes = {"sync_ref_model": "true", "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.9}
    changes |= {"precompute_ref_log_probs": "false"}
    run("rlhf.train_dpo", settings, tmp_path / "whole", **changes).finish()
    assert_killed_is_whole(
        "rlhf.train_dpo", settings, tmp_path / "whole", tmp_path / "killed", **changes
    )


@pytest.mark.slow
@pytest.mark.parametrize("module", STAGES)
def test_a_killed_run_with_lora_dropout_ends_in_the_same_weights(module, settings, tmp_path):
    changes = LORA | {"lora_dropout": 0.1, "disable_dropout": "false"}
    run(module, settings, tmp_path / "whole", **changes).finish()
    assert_killed_is_whole(module, settings, tmp_path / "whole", tmp_path / "killed", **changes)


@pytest.mark.launchers
@pytest.mark.parametrize("changes", [{}, ZERO2], ids=["ddp", "zero2"])
def test_two_ranks_learn_what_one_learns(alone, settings, tmp_path, changes):
    module, whole = alone
    run(module, settings, tmp_path / "two", 2, **HALVES | changes).finish()
    written = stages.read_json(tmp_path / f"two/checkpoint-{STEPS}" / stages.WHOLE)
    assert (written["processes"], written["zero_stage"]) == (2, 2 if changes else 0)
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), abs=1e-4)
    ours, theirs = weights(tmp_path / "two"), weights(whole)
    ours.pop("lm_head.weight", None)  # under ZeRO tied weights are written twice
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-3, msg=name)


@pytest.mark.launchers
@pytest.mark.parametrize("module", STAGES)
def test_a_killed_run_of_two_ranks_ends_in_the_same_weights(module, settings, tmp_path):
    run(module, settings, tmp_path / "whole", 2, **HALVES).finish()
    assert_killed_is_whole(module, settings, tmp_path / "whole", tmp_path / "killed", 2, **HALVES)


@pytest.mark.launchers
@pytest.mark.parametrize("module", STAGES)
def test_qlora_on_two_ranks(module, settings, tmp_path):
    changes = HALVES | QLORA | {"max_steps": 20, "learning_rate": 5e-3}
    record = run(module, settings, tmp_path / "out", 2, **changes).finish()
    difference = [v for k, v in record.items() if k.startswith("merge_max_")]
    assert record["finished"] and difference[0] < 1e-3
    curve = losses(tmp_path / "out")
    assert curve[0] == pytest.approx(0.693, abs=0.3) and sum(curve[-5:]) / 5 < 0.8 * curve[0]
    start = load_file(settings["model_name_or_path"] / "model.safetensors")
    merged = weights(tmp_path / "out")  # plain, and moved from the full-precision base
    name = "transformer.h.0.attn.c_attn.weight"
    assert merged[name].dtype == torch.float32 and merged[name].shape == start[name].shape
    assert 0 < (merged[name] - start[name]).abs().max() < 1
