"""Two real processes through both launchers, and two nodes: each learns what one process learns."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from processes import PRETRAIN, Processes, free_port
from safetensors.torch import load_file
from transformers import AutoConfig, GPT2Config

import stages
from pretrain.costs import flops_per_token
from pretrain.modeling_gpt import GPT2LMHeadModel

pytestmark = pytest.mark.launchers
SETTINGS = PRETRAIN | {
    "bf16": "false", "max_steps": 6, "save_total_limit": 2,
}  # fmt: skip
del SETTINGS["config_overrides"]
QUARTERS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu",
}  # fmt: skip
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def words(settings):
    return [str(word) for key, value in settings.items() for word in (f"--{key}", value)]


def accelerate(config, settings, *flags):
    """The command that starts two processes with a file of configs/launch."""
    file = ["--config_file", str(ROOT / "configs/launch" / config)]
    if "--num_processes" not in flags:
        flags = (*flags, "--num_processes", "2", "--main_process_port", str(free_port()))
    return [*ACCELERATE, *file, *flags, "-m", "pretrain.train", *words(settings)]


def deepspeed(config, settings):
    """The command that starts two processes with a file of configs/deepspeed."""
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    runner += ["--master_port", str(free_port()), "pretrain/train.py"]
    return [*runner, *words(settings), "--deepspeed", str(ROOT / "configs/deepspeed" / config)]


def run(command, cwd=ROOT, **environment):
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=500
    )


@pytest.fixture(scope="module")
def start(blocks_dir, tokenizer, tmp_path_factory):
    """The weights that all runs start from: ZeRO-3 draws its new ones in another order."""
    directory = tmp_path_factory.mktemp("start")
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, n_positions=32, vocab_size=len(tokenizer),
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=2, eos_token_id=3,
        pad_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(directory)
    return SETTINGS | {"data_dir": blocks_dir, "model_name_or_path": directory}


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """What one process learns from 8 blocks a step."""
    directory = tmp_path_factory.mktemp("runs") / "alone"
    Processes("pretrain.train", start | {"output_dir": directory}).finish()
    return directory


@pytest.fixture
def settings(start, tmp_path):
    return start | QUARTERS | {"output_dir": tmp_path / "out"}


def assert_learned_the_same(directory, alone, zero_stage):
    """Whole, of two processes, and within fp32 rounding what one process learned."""
    assert stages.read_json(directory / "run.json")["finished"]
    for step in (3, 6):
        whole = stages.read_json(directory / f"checkpoint-{step}" / stages.WHOLE)
        assert (whole["processes"], whole["zero_stage"]) == (2, zero_stage)
        assert "model.safetensors" in whole["files"]
        expected = load_file(alone / f"checkpoint-{step}" / "model.safetensors")
        saved = load_file(directory / f"checkpoint-{step}" / "model.safetensors")
        head = saved.pop("lm_head.weight", None)  # under ZeRO tied weights are written twice
        assert head is None or torch.equal(head, saved["transformer.wte.weight"])
        assert saved.keys() == expected.keys()
        for name, tensor in saved.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4, msg=name)
    last, final = directory / "checkpoint-6", load_file(directory / "model.safetensors")
    for name, tensor in load_file(last / "model.safetensors").items():
        assert torch.equal(tensor, final[name]), name
    first, second = (
        [line["loss"] for line in map(json.loads, (one / "metrics.jsonl").open()) if "loss" in line]
        for one in (directory, alone)
    )
    assert first == pytest.approx(second, abs=1e-5) and len(first) == 6


@pytest.mark.parametrize(
    ("launch", "config", "zero_stage"),
    [
        (accelerate, "cpu_2_processes.yaml", 0),
        (accelerate, "zero1.yaml", 1),
        (accelerate, "zero2.yaml", 2),
        (accelerate, "zero3.yaml", 3),
        (accelerate, "zero3_offload.yaml", 3),
        (deepspeed, "zero1.json", 1),
        (deepspeed, "zero2.json", 2),
        (deepspeed, "zero3.json", 3),
        (deepspeed, "zero3_offload.json", 3),
    ],
)
def test_two_processes_learn_what_one_learns(alone, settings, launch, config, zero_stage):
    on_cpu = {} if zero_stage else {"ACCELERATE_USE_CPU": "true"}  # it would switch ZeRO off
    done = run(launch(config, settings), **on_cpu)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert_learned_the_same(settings["output_dir"], alone, zero_stage)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3"])
def test_zero3_makes_each_architecture_and_knows_its_flops(
    model_type, blocks_dir, tokenizer, tmp_path
):
    """New weights: while ZeRO-3 is on, transformers cuts every model that it makes."""
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 16,
    } if model_type != "gpt2" else {"n_layer": 2, "n_embd": 32, "n_head": 2}  # fmt: skip
    settings = SETTINGS | QUARTERS | {
        "data_dir": blocks_dir, "output_dir": tmp_path / "out", "model_type": model_type,
        "config_overrides": json.dumps(sizes), "max_steps": 2, "eval_strategy": "steps",
        "eval_steps": 2, "deepspeed": ROOT / "configs/deepspeed/zero3.json",
    }  # fmt: skip
    record = Processes("pretrain.train", settings, 2).finish()
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.model_type == model_type
    assert record["flops_per_token"] == flops_per_token(config, 32)


def test_launchers_on_two_nodes_meet_through_the_slurm_template(alone, settings, tmp_path):
    """A stand-in for srun starts the template's command as node 0 and as node 1."""
    site = tmp_path / "site"
    (site / ".venv/bin").mkdir(parents=True)
    (site / ".venv/bin/activate").write_text("")
    (site / "configs").symlink_to(ROOT / "configs")
    python = f'exec "{sys.executable}" -m accelerate.commands.accelerate_cli "$@"\n'
    commands = {
        "scontrol": "echo 127.0.0.1\n",
        "srun": 'shift\ntest "$SRUN_CPUS_PER_TASK" = 1\n'
        "SLURM_NODEID=1 SLURM_STEP_NUM_TASKS=2 \"$@\" &\n"
        'SLURM_NODEID=0 SLURM_STEP_NUM_TASKS=2 "$@"\nwait $!\n',
        "accelerate": 'echo "machine $SLURM_NODEID: $*"\n' + python,
    }
    for name, script in commands.items():
        (site / name).write_text(f"#!/usr/bin/env bash\nset -e\n{script}")
        (site / name).chmod(0o755)
    template = ["bash", str(ROOT / "configs/launch/slurm.sh"), "-m", "pretrain.train"]
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1"}
    slurm |= {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": str(free_port())}
    slurm |= {"ACCELERATE_USE_CPU": "true"}
    path = f"{site}:{os.environ['PATH']}"
    done = run([*template, *words(settings)], site, PATH=path, **slurm)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for machine in (0, 1):
        assert f"machine {machine}: launch --config_file configs/launch/multi_node" in done.stdout
    assert_learned_the_same(settings["output_dir"], alone, zero_stage=0)


def test_a_launcher_that_starts_one_process_of_two_is_stopped(settings, tmp_path):
    config = tmp_path / "multi_cpu.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\n"
        "num_machines: 1\nnum_processes: 2\n"
    )
    done = run([*ACCELERATE, "--config_file", config, "-m", "pretrain.train", *words(settings)])
    assert done.returncode != 0 and "asked for several processes and started one" in done.stderr
    assert not settings["output_dir"].exists()


def test_muon_under_zero_is_refused(settings):
    done = run(accelerate("zero2.yaml", settings | {"optimizer": "muon"}))
    assert done.returncode != 0 and "ZeRO flattens the matrices that Muon needs" in done.stderr


def test_zero_that_accelerate_leaves_out_is_an_error(settings):
    done = run(accelerate("zero2.yaml", settings), ACCELERATE_USE_CPU="true")
    assert done.returncode != 0 and "ACCELERATE_USE_CPU" in done.stderr
