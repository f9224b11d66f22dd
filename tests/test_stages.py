"""The contract on disk: inputs, runs, resume, lineage."""

import json
import sys

import pytest

import stages


@pytest.fixture
def words(monkeypatch):
    """Sets this process's command line."""

    def set_words(*argv):
        monkeypatch.setattr(sys, "argv", ["sft/train.py", *argv])

    set_words()
    return set_words


def make_stage(path, finished=True, **files):
    """A stage's output with given files, recorded as the stage would."""
    path.mkdir(parents=True)
    for name, text in ({"config.json": "{}", "tokenizer.json": "{}"} | files).items():
        (path / name).write_text(text)
    record = {"finished": finished, "stage": path.name, "outputs": stages.hash_outputs(path)}
    stages.write_json(path / "run.json", record)
    return path


def test_a_missing_stage_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        stages.require_input(tmp_path / "tiny" / "pretrain", "config.json")
    command = "python -m pretrain.train --config configs/tiny/pretrain.yaml"
    assert "does not exist" in str(error.value) and command in str(error.value)


def test_a_missing_file_and_an_unfinished_run_are_refused(tmp_path):
    directory = make_stage(tmp_path / "tiny" / "sft")
    with pytest.raises(FileNotFoundError, match=r"\.safetensors is missing.*sft\.train"):
        stages.require_input(directory, "*.safetensors")
    unfinished = make_stage(tmp_path / "other" / "sft", finished=False)
    with pytest.raises(FileNotFoundError, match="unfinished run"):
        stages.require_input(unfinished)


def test_a_changed_tokenizer_or_template_is_refused(tmp_path):
    for name in ("tokenizer.json", "chat_template.jinja"):
        directory = make_stage(tmp_path / name / "sft", **{"chat_template.jinja": "{}"})
        assert stages.require_input(directory) == directory
        (directory / name).write_text("changed")
        with pytest.raises(ValueError, match=f"{name} is not the file that the stage wrote"):
            stages.require_input(directory)


def test_two_tokenizers_do_not_mix(tmp_path):
    first = make_stage(tmp_path / "a" / "sft")
    second = make_stage(tmp_path / "b" / "reward", **{"tokenizer.json": "other"})
    stages.require_same_tokenizer(first, first)
    with pytest.raises(ValueError, match="their ids mean different text"):
        stages.require_same_tokenizer(first, second)


def test_foreign_directories_and_hub_names_pass(tmp_path):
    (tmp_path / "model").mkdir()
    assert stages.require_input(tmp_path / "model") == tmp_path / "model"
    assert str(stages.require_input("openai-community/gpt2")) == "openai-community/gpt2"


@pytest.mark.parametrize(("launched", "seen", "fails"), [("1", 1, False), ("2", 1, True)])
def test_world_size_guard(monkeypatch, launched, seen, fails):
    monkeypatch.setenv("WORLD_SIZE", launched)
    if fails:
        with pytest.raises(ValueError, match="started 2 processes, the trainer sees 1"):
            stages.check_world_size(seen)
    else:
        stages.check_world_size(seen)


def test_a_run_is_unfinished_until_it_finishes(tmp_path, words):
    out, data = tmp_path / "sft", tmp_path / "rows.jsonl"
    data.write_text("{}")
    run = stages.start_run("sft", out, [], data_files=[data])
    assert stages.read_json(out / "run.json")["finished"] is False
    assert not stages.is_unchanged(out, [])
    run.finish({"loss": {"value": 1.0}})
    record = stages.read_json(out / "run.json")
    assert record["finished"] and record["peak_memory_bytes"] > 0
    assert json.loads((out / "eval.json").read_text())["loss"]["value"] == 1.0
    assert stages.is_unchanged(out, [])


def test_a_finished_run_is_redone_when_anything_it_depends_on_changes(tmp_path, words):
    data, config = tmp_path / "rows.jsonl", tmp_path / "sft.yaml"
    base = make_stage(tmp_path / "pretrain")
    out = tmp_path / "sft"
    argv = ["--config", str(config)]
    words(*argv)

    def run_again():
        data.write_text("{}")
        config.write_text("a: 1")
        (base / "config.json").write_text("{}")
        stages.start_run("sft", out, [], [base], [data]).finish()
        (out / "config.json").unlink(missing_ok=True)
        assert stages.is_unchanged(out, argv)

    run_again()
    assert not stages.is_unchanged(out, [*argv, "--seed", "1"])
    for path in (data, config, base / "config.json", out / "config.json"):
        run_again()
        path.write_text("changed")
        assert not stages.is_unchanged(out, argv), path


def test_launcher_flags_do_not_make_another_run(tmp_path, words):
    stages.start_run("sft", tmp_path / "sft", []).finish()
    argv = ["--local_rank=0", "--deepspeed", "configs/deepspeed/zero2.json"]
    assert stages.is_unchanged(tmp_path / "sft", argv)
    assert not stages.is_unchanged(tmp_path / "sft", [*argv, "--seed", "1"])


def test_an_interrupted_run_goes_on_only_when_nothing_changed(tmp_path, words):
    out = tmp_path / "sft"

    def interrupt():
        assert stages.start_run("sft", out, []).checkpoint is None
        for step, whole in ((5, True), (10, True), (15, False)):
            (out / f"checkpoint-{step}").mkdir(exist_ok=True)
            if whole:
                (out / f"checkpoint-{step}/trainer_state.json").write_text("{}")

    words("--seed", "1")
    interrupt()
    assert stages.start_run("sft", out, []).checkpoint == str(out / "checkpoint-10")
    words("--seed", "2")
    assert stages.start_run("sft", out, []).checkpoint is None
    assert not list(out.glob("checkpoint-*")), "another run's checkpoints must not be taken later"


def test_a_json_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run.json"
    stages.write_json(path, {"old": True})
    circular = {}
    circular["self"] = circular
    with pytest.raises(ValueError, match="Circular"):
        stages.write_json(path, circular)
    assert json.loads(path.read_text()) == {"old": True}
