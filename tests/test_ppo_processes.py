"""rlhf.train_ppo in real processes: killed and resumed, on two ranks, under ZeRO-2."""

import json
import math

import pytest
import torch
from conftest import ROOT, read_lines
from processes import Processes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import stages
from rlhf.train_ppo import PPOArguments, choose_reward_funcs

ZERO2 = {"deepspeed": ROOT / "configs/deepspeed/zero2.json"}
FILES = ("model.safetensors", "value_model/model.safetensors")


@pytest.fixture(scope="module")
def settings(base_dir, tiny_config, tokenizer, tmp_path_factory):
    """A run of three rollouts, each of four optimizer steps."""
    directory = tmp_path_factory.mktemp("ppo")
    torch.manual_seed(1)
    config = tiny_config.__class__(**tiny_config.to_dict() | {"num_labels": 1})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory / "reward")
    tokenizer.save_pretrained(directory / "reward")
    rows = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(24)]
    (directory / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "model_name_or_path": base_dir, "reward_model": directory / "reward",
        "reward_funcs": "verifier", "data_files": directory / "tasks.jsonl", "max_steps": 12,
        "per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2,
        "max_completion_length": 8, "learning_rate": 1e-3, "missing_eos_penalty": 1.0,
        "kl_target": 0.5, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2,
        "bf16": "false",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("step", "ranks", "zero"),
    [
        (4, 1, {}),  # between two rollouts
        (6, 1, {}),  # within one
        pytest.param(4, 2, {}, marks=pytest.mark.launchers),
        pytest.param(4, 2, ZERO2, marks=pytest.mark.launchers),
    ],
)
def test_a_killed_run_ends_in_the_same_policy_and_critic(settings, tmp_path, step, ranks, zero):
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def begin(directory):
        batch = {"per_device_train_batch_size": 4 // ranks, "output_dir": directory}
        return Processes("rlhf.train_ppo", settings | batch | zero, ranks)

    begin(whole).finish()
    written = killed / f"checkpoint-{step}" / stages.WHOLE
    assert begin(killed).kill(written.is_file), "too late"
    record = begin(killed).finish()
    assert len(record["resumed_from"]) == 1
    for name in FILES:
        expected, resumed = load_file(whole / name), load_file(killed / name)
        assert expected.keys() == resumed.keys()
        assert not [key for key in expected if not torch.equal(expected[key], resumed[key])]
    logs = [[(line["step"], line.get("ppo/score"), line["loss"])
             for line in read_lines(one / "metrics.jsonl") if "loss" in line]
            for one in (whole, killed)]  # fmt: skip
    assert logs[0] == logs[1] and len(logs[0]) == 12
    assert [step for step, score, _ in logs[0] if score is not None] == [1, 5, 9]


@pytest.mark.launchers
@pytest.mark.parametrize("zero", [{}, ZERO2], ids=["ddp", "zero2"])
def test_two_ranks_train_one_policy_and_one_critic(settings, base_dir, tmp_path, zero):
    halves = {"per_device_train_batch_size": 2, "max_steps": 4, "output_dir": tmp_path / "two"}
    Processes("rlhf.train_ppo", settings | halves | zero, ranks=2).finish()
    lines = [line for line in read_lines(tmp_path / "two/metrics.jsonl") if "loss" in line]
    assert lines[0]["ppo/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert lines[0]["ppo/kl"] == pytest.approx(0.0, abs=1e-5)
    assert lines[-1]["ppo/ratio"] != pytest.approx(1.0, abs=1e-5)  # in the second pass
    assert all(math.isfinite(line["loss"]) for line in lines) and len(lines) == 4
    kinds = (AutoModelForCausalLM, ""), (AutoModelForSequenceClassification, "value_model")
    for kind, folder in kinds:
        _, report = kind.from_pretrained(tmp_path / "two" / folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
    start, end = load_file(base_dir / FILES[0]), load_file(tmp_path / "two" / FILES[0])
    assert not torch.equal(start["transformer.wte.weight"], end["transformer.wte.weight"])


def test_somebody_has_to_pay(base_dir):
    with pytest.raises(ValueError, match="reward_funcs=.*reward_model=None"):
        choose_reward_funcs(PPOArguments(), base_dir, 8)
    with pytest.raises(ValueError, match="'verifire'.*among .*'verifier'"):
        choose_reward_funcs(PPOArguments(reward_funcs=["verifire"]), base_dir, 8)
    functions = choose_reward_funcs(PPOArguments(reward_funcs=["verifier"]), base_dir, 8)
    assert [f.__name__ for f in functions] == ["verifiable_reward"]
