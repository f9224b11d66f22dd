"""A run that is killed and started again ends in the weights of one that was not."""

import json
import random
import shutil
import time

import pytest
import torch
from conftest import ROOT
from processes import PRETRAIN, STEPS, Processes
from safetensors.torch import load_file

import stages

ZERO2 = {"deepspeed": ROOT / "configs/deepspeed/zero2.json"}
HALVES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
QUARTERS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def pretrain(blocks_dir, output_dir, ranks=1, **settings):
    settings = PRETRAIN | {"data_dir": blocks_dir, "output_dir": output_dir} | settings
    return Processes("pretrain.train", settings, ranks)


def weights(directory):
    return load_file(directory / "model.safetensors")


def assert_same_weights(directory, other):
    ours, theirs = weights(directory), weights(other)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


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
