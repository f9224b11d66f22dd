"""GRPO that is killed and started again, on one and two ranks; several rewards with weights."""

import json

import pytest
import torch
import yaml
from conftest import ROOT, read_lines
from processes import Processes
from safetensors.torch import load_file
from transformers import GPT2ForSequenceClassification

import stages

STEPS = 8
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}
HALF = {"per_device_train_batch_size": 4}
ZERO2 = {"deepspeed": str(ROOT / "configs/deepspeed/zero2.json")} | HALF


@pytest.fixture(scope="module")
def inputs(base_dir, tiny_config, tokenizer, tmp_path_factory):
    """A reward model with an opinion, and five tasks of two levels."""
    directory = tmp_path_factory.mktemp("grpo")
    torch.manual_seed(1)
    judge = GPT2ForSequenceClassification(tiny_config.__class__(**tiny_config.to_dict() | {
        "num_labels": 1, "initializer_range": 0.3
    }))  # fmt: skip
    judge.save_pretrained(directory / "reward")
    tokenizer.save_pretrained(directory / "reward")
    rows = [
        {"prompt": f"{n} + {n} = ", "answer": str(2 * n), "level": 1 + n // 3} for n in range(5)
    ]
    tasks = directory / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return base_dir, tasks, directory / "reward"


def train(inputs, output_dir, ranks=1, **settings):
    base, tasks, judge = inputs
    # 8 answers to 2 prompts, trained on twice: a rollout serves 2 steps, 5 tasks 2.5 rollouts.
    given = {
        "model_name_or_path": str(base), "data_files": str(tasks), "beta": 0.05,
        "reward_funcs": [str(judge), "repetition_penalty", "verifier"],
        "reward_weights": [0.7, 0.2, 1.0], "curriculum": True, "probe_prompts": 3,
        "num_generations": 4, "num_iterations": 2, "max_completion_length": 6,
        "per_device_train_batch_size": 8, "max_steps": STEPS, "save_steps": 2, "logging_steps": 1,
        "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "bf16": False, "use_cpu": True,
    }  # fmt: skip
    path = output_dir.parent / f"{output_dir.name}.yaml"
    path.write_text(yaml.safe_dump(given | settings), encoding="utf-8")
    settings = {"config": path, "output_dir": output_dir}
    return Processes("rlhf.train_grpo", settings, ranks)


def losses(directory):
    return [(x["step"], x["loss"], x["reward"]) for x in read_lines(directory / "metrics.jsonl")
            if "reward" in x]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {}),
        (2, LORA | HALF),
        pytest.param(2, ZERO2, marks=pytest.mark.launchers),
    ],
    ids=["full", "lora-two-ranks", "zero2"],
)
def test_a_killed_run_ends_in_the_same_weights(inputs, tmp_path, ranks, settings):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(inputs, whole, ranks, **settings).finish()
    at_four = killed / "checkpoint-4" / stages.WHOLE
    assert train(inputs, killed, ranks, **settings).kill(at_four.is_file), "too late"
    record = train(inputs, killed, ranks, **settings).finish()
    assert len(record["resumed_from"]) == 1
    first, second = (load_file(one / "model.safetensors") for one in (whole, killed))
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    before = load_file(inputs[0] / "model.safetensors")
    assert any(not torch.equal(first[name], before[name]) for name in before), "nothing was learned"
    assert losses(whole) == losses(killed)
    assert len(losses(whole)) == STEPS // 2, "a rollout is logged at the first of its two steps"
    log = read_lines(whole / "metrics.jsonl")[0]
    names = ("reward", "repetition_penalty_reward", "verifiable_reward")  # of its directory
    judged, repeats, right = (log[f"rewards/{name}/mean"] for name in names)
    assert log["reward"] == pytest.approx(0.7 * judged + 0.2 * repeats + right, abs=1e-5)


def test_a_checkpoint_inside_of_a_rollout_is_refused(inputs, tmp_path):
    process = train(inputs, tmp_path / "run", save_steps=3)
    process.ranks[0].join()
    assert process.ranks[0].exitcode == 1
    assert "save_steps=3 would save in the middle of a rollout, which serves 2" in process.output()
