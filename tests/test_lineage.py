"""The road that led to a model: written into run.json, printed, and enforced."""

import json
import shutil
import sys

import pytest

import lineage
import stages


@pytest.fixture
def road(tmp_path, monkeypatch):
    """tokenizer -> pretrain -> sft, as the stages record themselves; a function makes one."""
    monkeypatch.chdir(tmp_path)

    def make(stage, inputs=(), tokenizer="{}", weights=None, **arguments):
        monkeypatch.setattr(sys, "argv", [f"{stage}.py"])
        out = tmp_path / "output/tiny" / stage
        data = tmp_path / "rows.jsonl"
        data.write_text("{}")
        run = stages.start_run(stage, f"output/tiny/{stage}", [], inputs, ["rows.jsonl"])
        run.record["arguments"] = arguments
        (out / "tokenizer.json").write_text(tokenizer)
        (out / "chat_template.jinja").write_text("{{ messages }}")
        if weights:
            (out / "model.safetensors").write_text(weights)
        run.finish()
        return f"output/tiny/{stage}"

    return make


def test_run_json_chains_what_every_stage_made(road):
    tokenizer = road("tokenizer")
    pretrain = road("pretrain", [tokenizer], weights="base")
    sft = road("sft", [pretrain], weights="chat")
    steps = stages.read_json(f"{sft}/run.json")["lineage"]
    assert [step["stage"] for step in steps] == ["tokenizer", "pretrain"]
    base = stages.hash_outputs(pretrain)
    assert steps[1]["made"] == {
        "weights": base["model.safetensors"],
        "tokenizer": base["tokenizer.json"],
        "template": base["chat_template.jinja"],
    }
    assert steps[1]["inputs"][tokenizer] == steps[0]["made"]
    assert steps[1]["data"] == {"rows.jsonl": lineage.hash_data(lineage.Path("rows.jsonl"))}


def test_the_road_is_known_without_the_earlier_directories(road, tmp_path):
    sft = road("sft", [road("pretrain", [road("tokenizer")], weights="base")], weights="chat")
    shutil.rmtree("output/tiny/pretrain")
    (tmp_path / "rows.jsonl").write_text("other rows")
    text = lineage.format_road(sft)
    assert "1. tokenizer: output/tiny/tokenizer (on disk, unchanged)" in text
    assert "2. pretrain: output/tiny/pretrain (not on this disk)" in text
    assert "3. sft: output/tiny/sft (on disk, unchanged)" in text
    assert text.count("rows.jsonl") == 3 == text.count("CHANGED SINCE")


def test_a_step_that_was_made_anew_is_told(road):
    pretrain = road("pretrain", [road("tokenizer")], weights="base")
    sft = road("sft", [pretrain], weights="chat")
    road("pretrain", ["output/tiny/tokenizer"], weights="another base")
    assert "pretrain: output/tiny/pretrain (CHANGED SINCE)" in lineage.format_road(sft)


def test_two_models_of_one_road_share_its_steps(road):
    sft = road("sft", [road("pretrain", [road("tokenizer")], weights="base")], weights="chat")
    reward = road("reward", [sft], weights="judge")
    steps = lineage.trace([sft, reward])
    assert [step["stage"] for step in steps] == ["tokenizer", "pretrain", "sft", "reward"]


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_another_tokenizer_than_the_road_began_with_is_refused(road, name):
    sft = road("sft", [road("pretrain", [road("tokenizer")], weights="base")], weights="chat")
    assert str(stages.require_input(sft)) == sft
    # Swapped together with its record, as by copying files and editing run.json.
    stages.Path(sft, name).write_text("another")
    record = stages.read_json(f"{sft}/run.json")
    record["outputs"] = stages.hash_outputs(sft)
    stages.write_json(f"{sft}/run.json", record)
    with pytest.raises(ValueError, match="not the one it was made with.*tiny/tokenizer.*had"):
        stages.require_input(sft)


def test_a_template_may_be_given_to_a_model_that_came_with_another(road):
    base = road("pretrain", [road("tokenizer")], weights="base")
    stages.Path(base, "chat_template.jinja").write_text("theirs")
    sft = road("sft", [base], weights="chat", chat_template_path="mine.jinja")
    assert str(stages.require_input(sft)) == sft


def test_stages_behind_a_given_template_have_it(road, tmp_path):
    base = tmp_path / "theirs"  # somebody else's: it has no run.json
    base.mkdir()
    (base / "chat_template.jinja").write_text("theirs")
    sft = road("sft", [str(base)], weights="chat", chat_template_path="mine.jinja")
    reward = road("reward", [sft], weights="judge")
    assert str(stages.require_input(reward)) == reward
    assert str(stages.require_input(road("dpo", [sft, reward], weights="dpo")))


def test_judges_with_another_template_are_refused(road, tmp_path):
    sft = road("sft", weights="chat")
    shutil.copytree(sft, tmp_path / "judge")
    stages.require_same_tokenizer(sft, tmp_path / "judge")
    (tmp_path / "judge/chat_template.jinja").write_text("another")
    with pytest.raises(ValueError, match="chat_template.jinja.*write a conversation differently"):
        stages.require_same_tokenizer(sft, tmp_path / "judge")


def test_shards_have_one_hash_that_depends_on_their_order():
    shards = {"train-00000.parquet": "a" * 64, "train-00001.parquet": "b" * 64}
    swapped = dict(zip(shards, reversed(shards.values()), strict=True))
    assert lineage.summarize(shards) != lineage.summarize(swapped)
    assert lineage.summarize({"model.safetensors": "c" * 64}) == {"weights": "c" * 64}


def test_somebody_elses_model_begins_a_road(road, tmp_path, capsys):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/tokenizer.json").write_text("{}")
    sft = road("sft", ["theirs", "user/name"], weights="chat")
    lineage.main(["lineage", sft])
    text = capsys.readouterr().out
    assert "somebody else: theirs (on disk, unchanged)" in text
    assert "somebody else: user/name (a name on the Hub)" in text
    with pytest.raises(FileNotFoundError, match="a stage has written"):
        lineage.main(["lineage", "theirs"])


def test_old_records_without_a_road_are_followed_on_disk(road):
    sft = road("sft", [road("pretrain", [road("tokenizer")], weights="base")], weights="chat")
    for name in ("sft", "pretrain"):
        path = f"output/tiny/{name}/run.json"
        record = json.loads(stages.Path(path).read_text())
        del record["lineage"]
        stages.write_json(path, record)
    text = lineage.format_road(sft)
    assert [line[:1] for line in text.splitlines() if line[:1].isdigit()] == ["1", "2", "3"]
