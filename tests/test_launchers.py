"""The smoke recipe through the real launchers, and what it leaves, read by transformers alone."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import stages

pytestmark = pytest.mark.launchers
CHAT_STAGES = ("sft", "dpo", "ppo", "grpo")
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

LOAD_ALONE = """
import sys
assert not any(name in sys.modules for name in ("pretrain", "sft", "rlhf", "stages"))
from transformers import *
import torch
stage, path = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path)
assert tokenizer.pad_token_id == 0 and tokenizer.pad_token_id != tokenizer.eos_token_id
if stage == "reward":
    model = AutoModelForSequenceClassification.from_pretrained(path)
    assert model.config.num_labels == 1 and model.config.pad_token_id == 0
else:
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.config.model_type == "gpt2" and type(model).__module__.startswith("transformers.")
if stage in ("sft", "dpo", "ppo", "grpo"):
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True,
        return_tensors="pt", return_dict=True)
    stops = model.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stops, stops
    end, start = tokenizer.convert_tokens_to_ids("<|im_end|>"), ids["input_ids"].shape[1]
    class SayEnd(LogitsProcessor):  # an untrained model says it as its fourth token, not before
        def __call__(self, input_ids, scores):
            scores[:, stops] = -1e9
            if input_ids.shape[1] == start + 3:
                scores[:, end] = 1e9
            return scores
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=40, do_sample=False,
                             logits_processor=LogitsProcessorList([SayEnd()]))
    assert out.shape[1] == start + 4 and out[0, -1] == end, out
print("loaded", model.num_parameters())
"""


def run(command, cwd, **environment):
    done = subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A checkout with everything but output/."""
    directory = tmp_path_factory.mktemp("checkout") / "repository"
    ignore = shutil.ignore_patterns(".venv", "output", ".git", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, directory, ignore=ignore)
    return directory


@pytest.fixture(scope="module")
def smoke(workdir):
    """The smoke recipe, each training stage started by `accelerate launch`."""
    launch = ["--launch", "configs/launch/cpu.yaml"]
    return run([sys.executable, "scripts/pipeline.py", "configs/smoke", *launch], workdir)


def test_pipeline_prints_each_command(smoke):
    command = "accelerate launch --config_file configs/launch/cpu.yaml -m"
    for stage, (module, trains) in stages.STAGES.items():
        launcher = command if trains else "python -m"
        assert f"$ {launcher} {module} --config configs/smoke/{stage}.yaml" in smoke


@pytest.mark.parametrize("stage", stages.STAGES)
def test_each_stage_leaves_the_contract(workdir, smoke, stage):
    directory = workdir / "output/smoke" / stage
    record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    assert record["finished"] and record["stage"] == stage and record["wall_time_s"] > 0
    assert record["command"] == (
        f"python -m {stages.STAGES[stage].module} --config configs/smoke/{stage}.yaml"
    )
    assert record["outputs"] == stages.hash_outputs(directory)
    for name, metric in json.loads((directory / "eval.json").read_text()).items():
        assert {"value", "unit"} <= set(metric), name
    if stages.STAGES[stage].trains:
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        assert any("loss" in json.loads(line) for line in lines)
    assert not list(directory.rglob("*.partial"))


def test_every_stage_carries_the_same_tokenizer_and_template(workdir, smoke):
    output = workdir / "output/smoke"
    for name in ("tokenizer.json", "chat_template.jinja"):
        found = {stage: stages.hash_outputs(output / stage)[name] for stage in stages.STAGES}
        assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo", "ppo", "grpo"])
def test_outputs_load_with_transformers_alone(workdir, smoke, stage, tmp_path):
    script = tmp_path / "load.py"
    script.write_text(LOAD_ALONE, encoding="utf-8")
    command = [sys.executable, "-P", str(script), stage, str(workdir / "output/smoke" / stage)]
    assert "loaded" in run(command, tmp_path)


def test_qlora_leaves_its_adapter_and_a_merged_model(workdir, smoke):
    directory = workdir / "output/smoke/sft"
    assert (directory / "adapter/adapter_model.safetensors").is_file()
    record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    assert record["arguments"]["load_in_4bit"] and record["merge_max_logit_difference"] < 1e-3
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())


def test_the_second_run_skips_what_is_finished(workdir, smoke):
    command = [sys.executable, "scripts/pipeline.py", "configs/smoke"]
    again = run(command, workdir)
    assert again.count("finished and unchanged, skipped") == len(stages.STAGES)
    assert "$ python scripts/report.py output/smoke" in again
    assert (workdir / "output/smoke/report.html").is_file()


def test_chat_and_sample_answer(workdir, smoke):
    for command in (
        ["-m", "sft.chat", "output/smoke/grpo", "--prompt", "Hi", "--max_new_tokens", "4"],
        ["-m", "sft.chat", "output/smoke/sft", "--prompt", "你好", "--num_beams", "2"],
        ["-m", "pretrain.sample", "output/smoke/pretrain", "--max_new_tokens", "4"],
    ):
        run([sys.executable, *command], workdir)


def test_deepspeed_trains_on_two_processes(workdir, smoke):
    program = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    config = ["--config", "configs/smoke/pretrain.yaml"]
    config += ["--output_dir", "output/smoke_zero/pretrain"]
    words = ["--deepspeed", "configs/deepspeed/zero2.json", "--max_steps", "4", "--use_cpu", "true"]
    words += ["--optimizer", "adamw"]
    run([*program, "pretrain/train.py", *config, *words], workdir, DS_ACCELERATOR="cpu")
    record = json.loads((workdir / "output/smoke_zero/pretrain/run.json").read_text())
    assert record["finished"] and "model.safetensors" in record["outputs"]
