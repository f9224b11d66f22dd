"""Every YAML of every recipe parses with the stage's real, strict parser."""

import importlib
import json
from dataclasses import is_dataclass

import pytest
import yaml
from conftest import ROOT

import stages
from pretrain.hardware import training_defaults

RECIPES = sorted(path.parent for path in (ROOT / "configs").glob("*/sft.yaml"))
CONFIGS = sorted(path for recipe in RECIPES for path in recipe.glob("*.yaml"))
EXTRA = {"eval": "sft.eval", "grpo_reward": "rlhf.train_grpo"}
EXTRA |= {name: stage.module for name, stage in stages.BRANCHES.items()}


def module_of(path):
    name = path.stem
    return stages.STAGES[name].module if name in stages.STAGES else EXTRA[name]


def dataclasses_of(module):
    """The dataclasses that a stage parses, read off the annotations of its main."""
    return [hint for hint in module.main.__annotations__.values() if is_dataclass(hint)]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_yaml_parses_and_mirrors_its_path(path, tmp_path):
    module = importlib.import_module(module_of(path))
    defaults = training_defaults() if "train" in module.__name__ else None
    parsed = stages.parse_args(dataclasses_of(module), ["--config", str(path)], defaults)
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "output_dir" in config:
        assert config["output_dir"] == f"output/{path.parent.name}/{path.stem}"
        assert parsed[-1 if len(parsed) == 1 else 1].output_dir == config["output_dir"]
    text = path.read_text(encoding="utf-8")
    assert 5 <= len(text.splitlines()) <= 40
    assert "bf16" not in config and "use_cpu" not in config, "the machine is not the method's"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_each_stage_reads_what_an_earlier_one_writes(recipe):
    written = set()
    for stage in stages.STAGES:
        path = recipe / f"{stage}.yaml"
        if not path.is_file():
            continue
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key in ("tokenizer", "data_dir", "model_name_or_path", "reward_model"):
            value = str(config.get(key, ""))
            if value.startswith("output/"):
                assert value in written, f"{path.name}: {key}: {value} is not made before"
        written.add(config["output_dir"])


def test_launch_files_name_deepspeed_files_that_exist():
    for path in (ROOT / "configs/launch").glob("*.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if config["distributed_type"] == "DEEPSPEED":
            deepspeed = config["deepspeed_config"]
            assert list(deepspeed) == ["deepspeed_config_file"], "said once, in the JSON"
            json.loads((ROOT / deepspeed["deepspeed_config_file"]).read_text())


def test_zero3_gathers_the_weights_it_saves():
    config = json.loads((ROOT / "configs/deepspeed/zero3.json").read_text())
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


def test_unknown_key_names_the_nearest_known_one(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("learning_rte: 1e-4\noutput_dir: x\n")
    module = importlib.import_module("sft.train")
    expected = "config file.*'learning_rte'.*did you mean 'learning_rate'"
    with pytest.raises(ValueError, match=expected):
        stages.parse_args(dataclasses_of(module), ["--config", str(path)], training_defaults())


def test_unknown_flag_names_the_nearest_known_one():
    module = importlib.import_module("tokenizer.train")
    words = ["--vocab_sise", "300"]
    with pytest.raises(ValueError, match="command line.*'vocab_sise'.*did you mean 'vocab_size'"):
        stages.parse_args(dataclasses_of(module), words)


def test_abbreviated_flags_are_refused():
    module = importlib.import_module("tokenizer.train")
    with pytest.raises(ValueError, match="did you mean 'vocab_size'"):
        stages.parse_args(dataclasses_of(module), ["--vocab", "300"])


def test_a_flag_overrides_the_yaml_and_an_equals_sign_works():
    module = importlib.import_module("tokenizer.train")
    words = ["--config=configs/tiny/tokenizer.yaml", "--vocab_size", "999"]
    (args,) = stages.parse_args(dataclasses_of(module), words)
    assert args.vocab_size == 999
    assert args.data_files == ["data/generated/pretrain_train.jsonl"]


def test_missing_config_names_the_recipes():
    module = importlib.import_module("tokenizer.train")
    with pytest.raises(FileNotFoundError, match="no such file.*tiny"):
        stages.parse_args(dataclasses_of(module), ["--config", "configs/tinny/tokenizer.yaml"])


def test_remote_code_is_refused():
    module = importlib.import_module("sft.train")
    with pytest.raises(ValueError, match="trust_remote_code is refused"):
        words = ["--config", "configs/tiny/sft.yaml", "--trust_remote_code", "true"]
        stages.parse_args(dataclasses_of(module), words, training_defaults())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\nb: 2\n", "line 2"),
        ("- 1\n", "must contain a YAML mapping"),
        ("lr_scheduler_type: nonsense\n", "nonsense is not a valid"),
        ("load_best_model_at_end: true\neval_strategy: 'no'\n", "save and eval strategy to match"),
    ],
)
def test_a_refused_value_names_the_file(tmp_path, text, said):
    path = tmp_path / "pretrain.yaml"
    path.write_text(f"{text}data_dir: d\noutput_dir: x\n" if text[0] != "-" else text)
    module = importlib.import_module("pretrain.train")
    with pytest.raises(ValueError, match=f"(?s)pretrain.yaml: .*{said}"):
        stages.parse_args(dataclasses_of(module), ["--config", str(path)], training_defaults())
