"""SFT and the classifier in real processes: killed and resumed, and on two ranks."""

import json

import pytest
import torch
from conftest import ROOT
from processes import Processes
from safetensors.torch import load_file

import stages

QUESTIONS = ["{i} + {i}?", "What is twice {i}?", "请问 {i} 加 {i} 等于多少？"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """40 conversations with answers of different lengths, and as many labelled texts."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for i in range(40):
            user = {"role": "user", "content": QUESTIONS[i % 3].format(i=i)}
            said = {"role": "assistant", "content": "It is " * (i % 4) + f"{2 * i}."}
            row = {"messages": [user, said], "text": user["content"], "label": ["en", "zh"][i % 2]}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return file


@pytest.fixture
def settings(base_dir, rows):
    return {
        "model_name_or_path": base_dir, "data_files": rows, "max_steps": 9, "save_steps": 2,
        "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2,
        "warmup_steps": 2,
    }  # fmt: skip


FULL = {"validation_share": 0.2, "packing": "true", "max_length": 64, "neftune_noise_alpha": 5}
LORA = {"validation_share": 0.2, "max_length": 64, "use_peft": "true", "lora_r": 4}
QLORA = LORA | {"load_in_4bit": "true", "use_bnb_nested_quant": "true", "lora_dropout": 0.1}
HALVES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def read_losses(directory):
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def read_weights(directory):
    found = load_file(directory / "model.safetensors")
    head = found.pop("lm_head.weight", None)  # under ZeRO tied weights are written twice
    assert head is None or torch.equal(head, found["transformer.wte.weight"])
    return found


@pytest.mark.parametrize(
    ("module", "method"),
    [
        ("sft.train", FULL),
        ("sft.train", QLORA | HALVES),
        ("sft.train_classifier", {"freeze": "true"}),
        ("sft.train_classifier", {"use_peft": "true", "lora_r": 4, "lora_dropout": 0.1}),
    ],
    ids=["sft-packed-noisy", "sft-qlora-accumulated", "classifier-frozen", "classifier-lora"],
)
def test_a_killed_run_ends_in_the_same_weights(settings, tmp_path, module, method):
    settings |= method
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    Processes(module, settings | {"output_dir": whole}).finish()
    process = Processes(module, settings | {"output_dir": killed})
    assert process.kill((killed / "checkpoint-4" / stages.WHOLE).is_file), "too late"
    record = Processes(module, settings | {"output_dir": killed}).finish()
    assert len(record["resumed_from"]) == 1
    ours, theirs = read_weights(whole), read_weights(killed)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert read_losses(whole) == read_losses(killed) and len(read_losses(whole)) == 9
    assert (whole / "eval.json").read_text() == (killed / "eval.json").read_text()


@pytest.mark.parametrize(
    ("module", "method", "tolerance"),
    [
        ("sft.train", FULL | {"packing": "false", "neftune_noise_alpha": 0}, 1e-4),
        ("sft.train", FULL | {"packing": "false", "neftune_noise_alpha": 0, "zero2": True}, 1e-4),
        ("sft.train", QLORA | {"lora_dropout": 0}, 1e-4),
        ("sft.train_classifier", {}, 1e-4),
    ],
    ids=["sft-full", "sft-zero2", "sft-qlora", "classifier"],
)
def test_two_ranks_learn_what_one_learns(settings, tmp_path, module, method, tolerance):
    """Every rank trains on half of a batch whose answers have 2 to 11 tokens."""
    method = dict(method)
    ranks = {"deepspeed": ROOT / "configs/deepspeed/zero2.json"} if method.pop("zero2", 0) else {}
    settings |= method | {"bf16": "false", "save_strategy": "no", "max_steps": 5}
    one, two = tmp_path / "one", tmp_path / "two"
    Processes(module, settings | {"output_dir": one}).finish()
    ranks |= settings | {"output_dir": two, "per_device_train_batch_size": 1}
    ranks |= {"gradient_accumulation_steps": 2}
    record = Processes(module, ranks, ranks=2).finish()
    assert read_losses(one) == pytest.approx(read_losses(two), abs=tolerance)
    ours, theirs = read_weights(one), read_weights(two)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=name)
    if "use_peft" in method:
        assert record["merge_max_logit_difference"] < 1e-4
        assert record["merge_greedy_equal"] == 1.0
        assert all(way > 0.01 for way in record["chat_token_movement"].values())
