"""The contract on disk: inputs, runs, resume, lineage."""

import dataclasses
import json
import re
import sys
import types
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM

import provenance
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


def test_an_adapter_in_place_of_a_model_names_the_command_that_merges_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="It is a LoRA adapter: .* python -m sft.merge"):
        stages.require_input(tmp_path, "config.json")


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


@pytest.mark.parametrize(
    ("environment", "seen", "message"),
    [
        ({}, 1, None),
        ({"WORLD_SIZE": "1"}, 1, None),
        ({"WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, 4, None),  # a launcher a node
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 1, None),
        ({"MASTER_ADDR": "node0"}, 1, None),  # exported by a job script, no launcher
        # torchrun without use_cpu: independent copies
        ({"WORLD_SIZE": "2"}, 1, "started 2 processes, the trainer sees 1"),
        # srun, mpirun without a launcher
        ({"SLURM_STEP_NUM_TASKS": "8"}, 1, "started 8 processes, the trainer sees 1"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 1, "started 2 processes, the trainer sees 1"),
        # accelerate launch --cpu --num_processes 2, or MULTI_CPU: what it leaves in the environment
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            1,
            "asked for several processes and started one",
        ),
    ],
)
def test_world_size_guard(monkeypatch, environment, seen, message):
    for name in (*stages.PROCESS_COUNTS, "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if message:
        with pytest.raises(ValueError, match=message):
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


def test_a_stage_does_not_write_into_what_it_reads(tmp_path, words):
    stages.start_run("sft", tmp_path / "sft", []).finish()
    with pytest.raises(ValueError, match="is what the stage reads: name another"):
        stages.start_run("dpo", tmp_path / "dpo/../sft", [], [tmp_path / "sft"])
    assert stages.read_json(tmp_path / "sft/run.json")["stage"] == "sft"


def test_nothing_of_an_earlier_run_passes_for_the_next_ones(tmp_path, words):
    out, other = tmp_path / "sft", write_checkpoint(tmp_path / "other", 10)
    for asked in (None, other):
        (out / "adapter").mkdir(parents=True)
        for name in ("texts.jsonl", "guards.jsonl", "metrics.jsonl", "adapter/weights"):
            (out / name).write_text("old")
        run = stages.start_run("sft", out, [Training(asked)])
        assert run.checkpoint == asked
        assert [path.name for path in out.iterdir()] == ["run.json"]
        run.finish()


def test_launcher_flags_do_not_make_another_run(tmp_path, words):
    stages.start_run("sft", tmp_path / "sft", []).finish()
    argv = ["--local_rank=0", "--deepspeed", "configs/deepspeed/zero2.json"]
    assert stages.is_unchanged(tmp_path / "sft", argv)
    assert not stages.is_unchanged(tmp_path / "sft", [*argv, "--seed", "1"])


def write_checkpoint(out, step, whole=True):
    path = out / f"checkpoint-{step}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "weights").write_text("12345")
    (path / "trainer_state.json").write_text("{}")
    if whole:
        stages.write_json(path / stages.WHOLE, {"files": {"weights": 5, "trainer_state.json": 2}})
    return str(path)


def names(out):
    return sorted(path.name for path in out.glob("checkpoint-*"))


def test_an_interrupted_run_goes_on_only_when_nothing_changed(tmp_path, words, capsys):
    out = tmp_path / "sft"
    words("--seed", "1")
    assert stages.start_run("sft", out, []).checkpoint is None
    for step in (5, 10):
        write_checkpoint(out, step)
    write_checkpoint(out, 15, whole=False)
    write_checkpoint(out, 20)
    (out / "checkpoint-20/weights").write_text("123")  # whole once, cut off later
    (out / "adapter" / stages.BESIDE).mkdir(parents=True)
    assert stages.start_run("sft", out, []).checkpoint == str(out / "checkpoint-10")
    assert names(out) == ["checkpoint-10", "checkpoint-5"], "new files go beside no old ones"
    assert not (out / "adapter" / stages.BESIDE).exists()
    words("--seed", "2")
    assert stages.start_run("sft", out, []).checkpoint is None
    assert not names(out), "another run's checkpoints must not be taken later"
    said = "sft held an interrupted run with other arguments: this one starts over, checkpoint-10"
    assert f"{said} is removed" in capsys.readouterr().out
    assert stages.start_run("sft", out, []).checkpoint is None
    assert not capsys.readouterr().out, "there was nothing to lose"


@dataclasses.dataclass
class Training:
    """The fields of TrainingArguments that decide where a run goes on."""

    resume_from_checkpoint: str | None = None
    train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    world_size: int = 1


def test_a_path_without_a_whole_checkpoint_is_an_error_that_names_it(tmp_path, words):
    out = tmp_path / "sft"
    stages.start_run("sft", out, [Training()])
    write_checkpoint(out, 5)
    half = write_checkpoint(out, 10, whole=False)
    for path in (half, str(out / "checkpoint-99"), str(tmp_path / "elsewhere")):
        with pytest.raises(FileNotFoundError, match=re.escape(f"{path}: there is no whole")) as e:
            stages.start_run("sft", out, [Training(path)])
        assert path == str(tmp_path / "elsewhere") or "checkpoint-5" in str(e.value)
    assert names(out) == ["checkpoint-10", "checkpoint-5"], "an error must not remove anything"


def test_a_run_can_be_rolled_back_and_can_start_from_another(tmp_path, words):
    out, other = tmp_path / "sft", write_checkpoint(tmp_path / "other", 7)
    stages.start_run("sft", out, [Training()])
    asked = write_checkpoint(out, 5)
    write_checkpoint(out, 10)
    words("--resume_from_checkpoint", asked)
    assert stages.start_run("sft", out, [Training(asked)]).checkpoint == asked
    assert names(out) == ["checkpoint-5"]
    words()
    assert stages.start_run("sft", out, [Training()]).checkpoint == asked, "the same run goes on"
    words("--resume_from_checkpoint", other)
    assert stages.start_run("sft", out, [Training(other)]).checkpoint == other
    assert names(out) == [], "checkpoint-5 was of another run"
    newest = write_checkpoint(out, 8)
    assert stages.start_run("sft", out, [Training(other)]).checkpoint == newest, "killed: goes on"
    words()
    assert stages.start_run("sft", out, [Training()]).checkpoint is None, "not the same run"


def test_a_run_goes_on_with_the_same_batch_divided_otherwise(tmp_path, words):
    out = tmp_path / "sft"
    words("--seed", "1")
    stages.start_run("sft", out, [Training()])
    kept = write_checkpoint(out, 5)
    with pytest.raises(ValueError, match="took 8 examples a step.*it would be 16"):
        stages.start_run("sft", out, [Training(world_size=2)])
    words("--seed", "1", "--per_device_train_batch_size", "4")
    halves = Training(train_batch_size=4, world_size=2)
    assert stages.start_run("sft", out, [halves]).checkpoint == kept
    words("--seed", "1", "--per_device_train_batch_size", "16")
    assert stages.start_run("sft", out, [Training(train_batch_size=16)]).checkpoint is None


def test_a_json_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run.json"
    stages.write_json(path, {"old": True})
    circular = {}
    circular["self"] = circular
    with pytest.raises(ValueError, match="Circular"):
        stages.write_json(path, circular)
    assert json.loads(path.read_text()) == {"old": True}


def test_errors_for_the_user_come_without_frames_and_bugs_with_them(tmp_path):
    with pytest.raises(SystemExit, match="output/nowhere does not exist") as ended:
        with stages.plain_errors():
            stages.require_input("output/nowhere")
    assert ended.value.code != 0
    with pytest.raises(json.JSONDecodeError), stages.plain_errors():
        json.loads("{")  # raised by a library: somebody has to see where
    with pytest.raises(FileNotFoundError), stages.plain_errors():
        Path(tmp_path, "absent").read_text()
    with pytest.raises(KeyError), stages.plain_errors():
        raise KeyError("never for a user")


def test_a_model_that_transformers_does_not_find_is_no_traceback(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SystemExit, match="no file named"), stages.plain_errors():
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_ctrl_c_ends_with_its_exit_code():
    with pytest.raises(SystemExit) as ended, stages.plain_errors():
        raise KeyboardInterrupt
    assert ended.value.code == 130


def test_windows_has_neither_proc_nor_resource(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    info = types.SimpleNamespace(peak_wset=7)
    monkeypatch.setattr(psutil, "Process", lambda: types.SimpleNamespace(memory_info=lambda: info))
    assert provenance.measure_peak_memory() == 7
