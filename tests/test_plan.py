"""Costs: known parameter counts and FLOPs by hand, and predicted against measured peak memory."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, SENTENCES, quick_arguments
from transformers import AutoConfig, GPT2Config, TrainingArguments

import stages
from pretrain import costs
from pretrain.costs import activation_bytes, build_on_meta, count_parameters, flops_per_token
from pretrain.hardware import training_defaults
from pretrain.plan import LIBRARIES, Machine, Sizes, find_sizes, make_plan
from pretrain.prepare import PrepareArguments, main
from pretrain.train import PretrainArguments, choose_config, plan_run

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
GPT2_SIZES = {  # layers, width, heads -> parameters of the published checkpoints
    (12, 768, 12): 124_439_808,
    (24, 1024, 16): 354_823_168,
    (36, 1280, 20): 774_030_080,
    (48, 1600, 25): 1_557_611_200,
}


@pytest.mark.parametrize(("sizes", "expected"), GPT2_SIZES.items())
def test_the_published_sizes_have_their_parameters(sizes, expected):
    layers, width, heads = sizes
    model = build_on_meta(GPT2Config(n_layer=layers, n_embd=width, n_head=heads))
    assert count_parameters(model).total == model.num_parameters() == expected
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_flops_by_hand():
    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=100, n_positions=16)
    matrices = 2 * (8 * 24 + 8 * 8 + 2 * 8 * 32) + 100 * 8  # q k v, projection, MLP; tied head
    assert count_parameters(build_on_meta(config)).matrices == matrices
    assert flops_per_token(config, 16) == 6 * matrices + 2 * 12 * 16 * 8


def test_flops_of_grouped_heads_count_every_query():
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=96, num_hidden_layers=3, vocab_size=50,
        num_attention_heads=4, num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    layer = 64 * 128 + 2 * 64 * 32 + 128 * 64 + 3 * 64 * 96
    assert flops_per_token(config, 10) == 6 * (3 * layer + 50 * 64) + 12 * 3 * 10 * 128


def test_states_by_setting():
    parameters = costs.Parameters(total=1000, matrices=900, largest_layer=100)
    adam = costs.optimizer_bytes(parameters, "adamw", 0)
    assert adam == 8000
    assert costs.optimizer_bytes(parameters, "muon", 200) == 8 * 300 + 4 * 700
    assert costs.state_bytes(parameters, "ddp", 1, adam).device == 16_000
    assert costs.state_bytes(parameters, "ddp", 4, adam).device == 20_000
    assert costs.state_bytes(parameters, "zero1", 4, adam).device == 8_000
    assert costs.state_bytes(parameters, "zero2", 4, adam).device == 2 * 1000 + 18 * 250
    assert costs.state_bytes(parameters, "zero3", 4, adam).device == 4 * 100 + 18 * 250


def test_without_deepspeed_the_formulas_stand_in_and_say_so(monkeypatch):
    parameters = costs.Parameters(total=1000, matrices=900, largest_layer=100)
    with_it = costs.state_bytes(parameters, "zero2", 4, 8000)
    monkeypatch.setattr(costs.importlib.util, "find_spec", lambda name: None)
    without = costs.state_bytes(parameters, "zero2", 4, 8000)
    assert without.device == with_it.device
    assert "deepspeed is not installed" in without.source
    assert costs.state_bytes(parameters, "zero3_offload", 4, 8000).host == 18_000


def test_checkpointing_keeps_one_layer_and_the_inputs():
    config = GPT2Config(n_layer=8, n_embd=64, n_head=2, vocab_size=128, n_positions=32)
    whole, kept = (
        activation_bytes(config, 4, 32, True, checkpointing=flag)["layers"] for flag in (0, 1)
    )
    assert kept == whole // 8 + 8 * 4 * 64 * 4 * 32


def test_sizes_come_from_the_data_then_from_the_recipe(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert find_sizes("output/gpt2-100m/prepare") == Sizes(50_304, 1024, 2_500_000_000)
    with pytest.raises(ValueError, match="output/nothing/prepare does not exist.*vocabulary"):
        find_sizes("output/nothing/prepare")


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (2.0, 6), (0.5, 2)])
def test_the_last_step_of_an_epoch_counts(tmp_path, epochs, steps):
    """5 blocks, 2 a step: as transformers counts them."""
    config = GPT2Config(n_layer=1, n_embd=16, n_head=1, vocab_size=8, n_positions=4)
    args = quick_arguments(tmp_path, num_train_epochs=epochs, per_device_train_batch_size=2)
    plan = make_plan(config, Sizes(8, 4, 20), args, "adamw", Machine(1, 10**9, False, "sdpa"))
    assert plan.steps == steps


def test_the_plan_is_of_the_model_that_is_gone_on_from(tmp_path):
    GPT2Config(n_layer=3, n_embd=32, n_head=2).save_pretrained(tmp_path)
    args = PretrainArguments(
        model_name_or_path=str(tmp_path), config_overrides={"n_layer": 1, "n_embd": 16}
    )
    config = choose_config(args, Sizes(50_257, 1024, None))
    assert (config.n_layer, config.n_embd) == (3, 32)


def run(*words, cwd=ROOT):
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_dry_run_needs_no_data_and_writes_nothing(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    words = ["--config", "configs/gpt2-100m/pretrain.yaml", "--dry_run"]
    shown = run("-m", "pretrain.train", *words, cwd=tmp_path)
    assert "124,475,904 parameters" in shown  # 124,439,808 and 47 more rows of 768
    assert "4,768 steps" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["configs"]
    shown = run("-m", "pretrain.train", *words, "--minutes", "90", cwd=tmp_path)
    assert "minutes      90: as many steps as they hold" in shown


def test_plan_of_a_recipe_on_gpus():
    rate = ["--gpus", "8", "--memory", "4", "--flops_per_second", "1e14"]
    lines = run("scripts/plan.py", "configs/gpt2-100m", *rate).splitlines()
    assert any("524,288 tokens on 8 process(es)" in line for line in lines)
    assert any("2,499,805,184 tokens" in line for line in lines)
    (zero2,) = [line for line in lines if line.split()[:1] == ["zero2"]]
    assert "DOES NOT FIT" in zero2  # 0.53 GB of states, but rows of 16 need more than 4 GB
    assert lines[-1].startswith("time ") and "44.5 min" in lines[-1], lines[-1]


RUNS = {  # what dominates: the states, the layers' activations, the loss and the embeddings
    "states": ({"n_layer": 8, "n_embd": 512, "n_head": 8}, 2, 128),
    "layers": ({"n_layer": 4, "n_embd": 256, "n_head": 4}, 24, 256),
    "vocabulary": ({"n_layer": 2, "n_embd": 384, "n_head": 6, "vocab_size": 40_064}, 8, 128),
}


@pytest.fixture(scope="module")
def baseline():
    """Bytes of a process that has imported what pretraining imports and has trained nothing."""
    code = (
        "import stages, pretrain.train as train;"
        "from pretrain.hardware import set_up_process, training_defaults; set_up_process();"
        "classes = [train.PretrainArguments, train.TrainingArguments];"
        "args, training_args = stages.parse_args(classes, [], training_defaults());"
        "import torch; layer = torch.nn.Linear(64, 64); training_args.device;"
        "trainer = train.PretrainTrainer(layer, training_args, optimizer_name='adamw',"
        "loss_guard=train.LossGuard('', []));"
        "layer(torch.ones(8, 64)).sum().backward();"
        "import provenance; print(provenance.measure_peak_memory())"
    )
    return int(run("-c", code).splitlines()[-1])


@pytest.mark.parametrize("name", RUNS)
def test_predicted_memory_is_within_a_quarter(name, baseline, tokenizer, tmp_path, monkeypatch):
    sizes, rows, context = RUNS[name]
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in SENTENCES * 1500)
    (tmp_path / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(sys, "argv", ["prepare"])
    files = [str(tmp_path / "text.jsonl")]
    directories = {"tokenizer": str(tmp_path / "tokenizer")}
    directories["output_dir"] = str(tmp_path / "prepare")
    main(PrepareArguments(files, files, block_size=context, **directories))
    words = [
        "--data_dir", f"{tmp_path}/prepare", "--output_dir", f"{tmp_path}/pretrain",
        "--config_overrides", json.dumps(sizes), "--optimizer", "adamw", "--max_steps", "3",
        "--per_device_train_batch_size", str(rows), "--save_strategy", "no",
        "--eval_documents", "4", "--learning_rate", "1e-4",
    ]  # fmt: skip
    run("-m", "pretrain.train", *words)
    measured = json.loads((tmp_path / "pretrain/run.json").read_text())["peak_memory_bytes"]
    classes = [PretrainArguments, TrainingArguments]
    plan = plan_run(*stages.parse_args(classes, words, training_defaults()))
    predicted = plan.memory("ddp") - LIBRARIES  # other machines' libraries have other sizes
    shown = f"{predicted:,} predicted, {measured - baseline:,} measured, {baseline:,} of libraries"
    print(shown)
    assert abs(predicted - (measured - baseline)) < 0.25 * (measured - baseline), shown
