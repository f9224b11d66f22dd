"""The pipeline's own decisions; tests/test_launchers.py runs it."""


import pytest
from conftest import ROOT, load_script


@pytest.fixture(scope="module")
def pipeline():
    return load_script("pipeline")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_stages_are_chosen_in_order(pipeline):
    tiny = ROOT / "configs/tiny"
    everything = pipeline.choose_stages(tiny, None, None, [])
    assert everything[:4] == ["tokenizer", "prepare", "pretrain", "sft"] and len(everything) == 8
    assert pipeline.choose_stages(tiny, "sft", "dpo", ["reward"]) == ["sft", "dpo"]


def test_unknown_stage_and_recipe_name_the_known_ones(pipeline):
    with pytest.raises(ValueError, match="'stf' is not a stage.*tokenizer, prepare, pretrain, sft"):
        pipeline.choose_stages(ROOT / "configs/tiny", "stf", None, [])
    with pytest.raises(FileNotFoundError, match="configs/tiny"):
        pipeline.choose_stages(ROOT / "configs/tinny", None, None, [])
    with pytest.raises(ValueError, match="no stage is left"):
        pipeline.choose_stages(ROOT / "configs/tiny", "dpo", "sft", [])


def test_overrides_become_flags(pipeline):
    settings = ["sft.learning_rate=1e-4", "sft.max_steps=3", "dpo.beta=0.2"]
    assert pipeline.group_overrides(settings, ["sft", "dpo"]) == {
        "sft": ["--learning_rate", "1e-4", "--max_steps", "3"],
        "dpo": ["--beta", "0.2"],
    }
    for wrong in ("learning_rate=1", "sft.learning_rate", "ppo.beta=1"):
        with pytest.raises(ValueError, match="write STAGE.KEY=VALUE"):
            pipeline.group_overrides([wrong], ["sft", "dpo"])


def test_output_dir_follows_its_override(pipeline):
    argv = ["--config", "configs/tiny/sft.yaml"]
    assert pipeline.read_output_dir(argv) == "output/tiny/sft"
    assert pipeline.read_output_dir([*argv, "--output_dir", "x"]) == "x"


def test_launcher_words(pipeline):
    assert pipeline.launcher("sft", None) == ["python", "-m"]
    launched = pipeline.launcher("sft", "configs/launch/cpu.yaml")
    assert launched == ["accelerate", "launch", "--config_file", "configs/launch/cpu.yaml", "-m"]
    assert pipeline.launcher("tokenizer", "configs/launch/cpu.yaml") == ["python", "-m"]
