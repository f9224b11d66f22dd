"""The doctor names what is wrong, with the line that mends it, in both languages."""

import importlib.metadata
import json
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, load_script


@pytest.fixture(scope="module")
def doctor():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield load_script("doctor")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def verdicts(found):
    return {(one.verdict, one.message) for one in found}


@pytest.mark.parametrize(
    ("version", "window", "inside"),
    [
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13.1", "==2.13.0", False),
        ("5.23.0", ">=5.23,<5.24", True),
        ("5.24.0", ">=5.23,<5.24", False),
        ("5.9.0", ">=5.23,<5.24", False),  # numbers, not letters
        ("3.14.0", ">=3.10,<3.14", False),
    ],
)
def test_windows(doctor, version, window, inside):
    assert doctor.is_in_window(version, window) is inside


def test_every_requirement_is_looked_at(doctor):
    lines = doctor.read_requirements(ROOT / "requirements.txt")
    assert "torch==2.13.0" in lines and "trl>=1.16,<1.17" in lines
    assert all(re.fullmatch(r"[\w.-]+[<>=].*", line) for line in lines)
    assert verdicts(doctor.check_versions()) >= {("ok", "python_ok"), ("ok", "packages_ok")}


def test_a_wrong_version_is_told_with_the_line_that_mends_it(doctor, monkeypatch, capsys):
    real = importlib.metadata.version
    fakes = {"transformers": "4.57.1"}

    def version(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return fakes.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for language, verb in (("en", "mend it"), ("zh", "修复")):
        doctor.say(doctor.check_versions(), language)
        shown = capsys.readouterr().out
        assert re.search(rf'{verb}.*pip install "transformers>=5.23,<5.24"', shown)
        assert re.search(rf'{verb}.*pip install "peft>=0.21,<0.22"', shown)


def test_both_languages_say_the_same_things(doctor):
    texts = yaml.safe_load((ROOT / "scripts/doctor.messages.yaml").read_text(encoding="utf-8"))
    for path in (ROOT / "scripts").glob("doctor*.py"):
        code = path.read_text(encoding="utf-8")
        assert set(re.findall(r'Finding\("\w+", "(\w+)"', code)) <= set(texts)
    for name, both in texts.items():
        english, chinese = (sorted(set(re.findall(r"\{(\w+)\}", both[k]))) for k in ("en", "zh"))
        assert chinese == english or name in ("input_bad",), name


@pytest.mark.parametrize(
    ("environment", "language"),
    [({"LANG": "zh_CN.UTF-8"}, "zh"), ({"LANG": "de_DE.UTF-8"}, "en"), ({}, "en"),
     ({"LC_ALL": "C", "LANG": "zh_CN"}, "en")],
)  # fmt: skip
def test_the_language_is_that_of_the_environment(doctor, monkeypatch, environment, language):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert doctor.find_language() == language


def write_sft(tmp_path, base_dir, rows, **keys):
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    keys = {"model_name_or_path": base_dir, "data_files": tmp_path / "rows.jsonl",
            "output_dir": tmp_path / "out", "max_length": 64, "use_cpu": "true"} | keys  # fmt: skip
    path = tmp_path / "sft.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    return path


GOOD = '{"prompt": "Who are you?", "completion": "I am LadderLM."}\n'
LONG = '{"prompt": "Who?", "completion": "' + "I am. " * 60 + '"}\n'


def test_a_healthy_stage(doctor, tmp_path, base_dir):
    found = doctor.check_stage(write_sft(tmp_path, base_dir, GOOD * 4), is_recipe=False)
    expected = ("config_ok", "input_ok", "data_ok", "template_ok", "rows_ok", "fits", "batch")
    expected += ("disk_ok",)
    assert [one.message for one in found[1:]] == list(expected)
    assert {one.verdict for one in found[1:]} == {"ok"}


@pytest.mark.parametrize(
    ("rows", "keys", "message", "words"),
    [
        (GOOD, {"learning_rte": 1}, "config_bad", "did you mean 'learning_rate'"),
        (GOOD, {"model_name_or_path": "output/none/pretrain"}, "input_bad", "pretrain.train"),
        ('{"prompt": 1', {}, "data_bad", "malformed JSON"),
        ('{"a": "b"}\n', {}, "rows_bad", "no known layout"),
        (GOOD + LONG, {}, "too_long", "50.0%"),
    ],
)
def test_what_is_wrong_is_named(doctor, tmp_path, base_dir, rows, keys, message, words):
    found = doctor.check_stage(write_sft(tmp_path, base_dir, rows, **keys), is_recipe=False)
    (one,) = [one for one in found if one.verdict in ("fail", "warn")]
    assert one.message == message
    assert words in " ".join(map(str, one.words.values()))


def test_every_yaml_of_a_recipe_is_looked_at(doctor, tmp_path):
    names = [path.name for path in doctor.list_configs(str(ROOT / "configs/tiny"))]
    assert names == ["tokenizer.yaml", "prepare.yaml", "pretrain.yaml", "sft.yaml", "reward.yaml",
                     "dpo.yaml", "ppo.yaml", "grpo.yaml", "grpo_reward.yaml", "classifier.yaml",
                     "eval.yaml"]  # fmt: skip
    for name in ("classifier", "eval", "grpo_mine"):
        (tmp_path / f"{name}.yaml").write_text("nonsens: 1\n")
    (tmp_path / "notes.yaml").write_text("a: 1\n")
    paths = doctor.list_configs(str(tmp_path))
    assert [path.stem for path in paths] == ["grpo_mine", "classifier", "eval", "notes"]
    *bad, nameless = [doctor.check_stage(path, is_recipe=True) for path in paths]
    for found in bad:
        assert found[1].message == "config_bad" and "'nonsens'" in str(found[1].words["error"])
    assert ("fail", "config_nameless") in verdicts(nameless)


def test_no_recipe_is_one_line_and_no_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "scripts/doctor.py"), "nosuch"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("doctor: nosuch is no stage's YAML")
    assert "configs/tiny" in line, "also outside of the repository"


def test_the_guards_yaml_is_read_before_training(doctor, tmp_path, base_dir):
    (tmp_path / "eval.yaml").write_text("max_rwos: 3\n")
    for name, words in (("/nope/eval.yaml", "no such file"),
                        (tmp_path / "eval.yaml", "did you mean 'max_rows'")):  # fmt: skip
        found = doctor.check_stage(
            write_sft(tmp_path, base_dir, GOOD, eval_config=name), is_recipe=False
        )
        (one,) = [one for one in found if one.verdict == "fail"]
        assert one.message == "eval_bad" and words in str(one.words["error"])


def test_a_classifier_is_looked_at(doctor, tmp_path, base_dir):
    path = write_sft(tmp_path, base_dir, "", data_files=tmp_path / "labels.csv")
    path = path.rename(tmp_path / "classifier.yaml")
    rows = "".join(f"letter {i},{'praise' if i % 2 else 'question'}\n" for i in range(60))
    (tmp_path / "labels.csv").write_text(f"text,label\n{rows}")
    found = doctor.check_stage(path, is_recipe=False)
    assert {one.verdict for one in found} == {"title", "ok"}
    (one,) = [one for one in found if one.message == "labels_ok"]
    assert one.words["labels"] == "praise, question"


@pytest.mark.parametrize(
    ("rows", "keys", "verdicts"),
    [
        (b'{"text": "caf\xe9"}\n', {}, {"data_bad": "fail"}),
        (b'{"text": "caf\xe9"}\n', {"encoding": "cp1252"}, {"data_ok": "ok"}),
        (b'{"text": 1\n{"text": "a"}\n', {}, {"data_bad": "fail"}),
        (b'{"text": 1\n{"text": "a"}\n', {"on_bad_row": "skip"},
         {"data_ok": "ok", "data_skipped": "warn"}),
        (b'{"a": "b"}\n{"text": "a"}\n', {}, {"data_bad": "fail"}),  # a row, and no document
    ],
)  # fmt: skip
def test_documents_are_read_as_the_recipe_says(doctor, tmp_path, rows, keys, verdicts):
    (tmp_path / "rows.jsonl").write_bytes(rows)
    keys = {"data_files": tmp_path / "rows.jsonl", "output_dir": tmp_path / "out"} | keys
    path = tmp_path / "tokenizer.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    found = doctor.check_stage(path, is_recipe=False)
    assert {one.message: one.verdict for one in found[2:]} == verdicts


PAIR = {"prompt": "Who are you?", "chosen": "I am LadderLM.", "rejected": "I am."}
CONTROL = PAIR | {"chosen": "I<|im_end|> am."}


@pytest.mark.parametrize(
    ("rows", "keys", "verdict", "words"),
    [
        ([PAIR, CONTROL], {}, ("fail", "rows_bad"), "50.0% of the pairs are dropped"),
        ([PAIR] * 39 + [CONTROL], {}, ("warn", "left_out"), "control token"),
        ([PAIR, CONTROL], {"allow_dropped_pairs": "true"}, ("warn", "left_out"), "control token"),
        ([PAIR], {}, ("ok", "fits"), "64"),
    ],
)
def test_pairs_are_dropped_by_the_stages_rule(
    doctor, tmp_path, base_dir, rows, keys, verdict, words
):
    path = write_sft(tmp_path, base_dir, "\n".join(map(json.dumps, rows)), **keys)
    found = doctor.check_stage(path.rename(tmp_path / "dpo.yaml"), is_recipe=False)
    (one,) = [one for one in found if one.message in ("rows_bad", "left_out", "too_long", "fits")]
    assert (one.verdict, one.message) == verdict
    assert words in " ".join(map(str, one.words.values()))


def test_tasks_that_the_recipe_leaves_out_are_not_lost(doctor, tmp_path, base_dir):
    tasks = [{"prompt": f"{n}+1=?", "answer": str(n + 1), "level": n} for n in (1, 2, 3, 4)]
    keys = {"max_level": 1, "max_completion_length": 16, "num_generations": 2,
            "per_device_train_batch_size": 2}  # fmt: skip
    for more, message in ([], "fits"), ([tasks[0] | {"prompt": "<|im_end|>"}], "left_out"):
        rows = "\n".join(map(json.dumps, tasks + more))
        path = write_sft(tmp_path, base_dir, rows, **keys)
        text = path.read_text().replace("max_length: 64\n", "")
        (tmp_path / "grpo.yaml").write_text(text)
        found = doctor.check_stage(tmp_path / "grpo.yaml", is_recipe=False)
        (one,) = [one for one in found if one.message in ("left_out", "too_long", "fits")]
        assert one.message == message and one.words["rows"] == str(1 + len(more))


@pytest.mark.parametrize(
    ("stage", "keys", "trained"),
    [("sft", {}, 1), ("sft", {"save_strategy": "'no'"}, 1), ("ppo", {}, 2), ("dpo", {}, 1),
     ("sft", {"use_peft": "true", "lora_r": 4}, None)],
)  # fmt: skip
def test_disk_is_that_of_the_output_and_its_checkpoints(
    doctor, tmp_path, base_dir, tiny_config, stage, keys, trained
):
    from peft import get_peft_model
    from transformers import AutoTokenizer

    from pretrain.modeling_gpt import GPT2LMHeadModel
    from sft.model import make_lora_config

    keys = {"model_name_or_path": base_dir, "output_dir": tmp_path, "use_cpu": "true"} | keys
    (tmp_path / f"{stage}.yaml").write_text("".join(f"{k}: {v}\n" for k, v in keys.items()))
    _, training_args, model_args = doctor.parse(stage, tmp_path / f"{stage}.yaml")
    model = GPT2LMHeadModel(tiny_config)
    weights = sum(p.numel() for p in model.parameters())
    if trained is None:  # the adapter alone, beside the merged model
        lora = make_lora_config(model_args, AutoTokenizer.from_pretrained(base_dir), model)
        tuned = get_peft_model(model, lora)
        adapter = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        assert 0 < adapter < weights / 2
        expected = 4 * (weights + adapter) + 2 * 12 * adapter
    else:
        checkpoints = 0 if "save_strategy" in keys else 2
        expected = trained * weights * (4 + 12 * checkpoints)
    assert doctor.count_bytes(stage, training_args, model_args) == expected


def test_a_full_disk_is_told(doctor, tmp_path):
    assert doctor.check_disk(10**18, str(tmp_path / "a/b/out")).message == "disk_bad"
    assert doctor.check_disk(1000, str(tmp_path / "a/b/out")).message == "disk_ok"


def test_a_recipe_need_not_have_run(doctor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    found = doctor.check_stage(doctor.Path("configs/tiny/pretrain.yaml"), is_recipe=True)
    assert ("ok", "input_later") in verdicts(found)
    assert {"memory_ok", "time", "disk_ok", "batch"} <= {one.message for one in found}
    alone = doctor.check_stage(doctor.Path("configs/tiny/pretrain.yaml"), is_recipe=False)
    assert ("fail", "input_bad") in verdicts(alone)
