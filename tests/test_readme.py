"""What the README says exists: its commands parse, its paths are there, both languages agree."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT

import stages
from pretrain.hardware import training_defaults

READMES = [ROOT / "README.md", ROOT / "README.zh.md"]


def commands_of(path):
    """The command lines of the fenced blocks without a language, and of the stage table."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`((?:python|accelerate|deepspeed|bash) [^`]+)`", text)
    return [line for line in lines if re.match(r"(python|accelerate|deepspeed|bash) ", line)]


COMMANDS = sorted({command for path in READMES for command in commands_of(path)})


def test_both_languages_show_the_same_commands():
    english, chinese = (sorted(set(commands_of(path))) for path in READMES)
    assert english == chinese
    assert len(english) >= 15


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_one_that_exists(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(command, comments=True)]
    for word in words:
        if re.fullmatch(r"(configs|scripts|data|pretrain)/[\w./-]+", word):
            assert (ROOT / word).exists() or word.startswith("data/generated"), word
    module = next((words[i + 1] for i, word in enumerate(words) if word == "-m"), None)
    if module is None:
        script = next(word for word in words if word.endswith((".sh", ".py")))
        assert (ROOT / script).is_file()
        module = script[:-3].replace("/", ".") if words[0] == "deepspeed" else None
    if module is None or module == "webbrowser":
        return
    imported = importlib.import_module(module)
    if "--config" in words or module in {stage.module for stage in stages.STAGES.values()}:
        start = words.index("--config") if "--config" in words else words.index(module) + 1
        hints = [h for n, h in imported.main.__annotations__.items()
                 if n not in ("return", "directory", "directories")]  # fmt: skip
        defaults = training_defaults() if ".train" in module else None
        argv = [word for word in words[start:] if word not in ("--deepspeed",)]
        argv = [word for word in argv if not word.startswith("configs/deepspeed")]
        stages.parse_args(hints, argv, defaults)


def test_both_languages_name_every_stage_and_number_alike():
    texts = [path.read_text(encoding="utf-8") for path in READMES]
    for stage in stages.STAGES.values():
        assert all(f"python -m {stage.module} " in text for text in texts), stage.module
    tables = [re.findall(r"\[\d[\d., ]+\]", text) for text in texts]
    assert tables[0] == tables[1], "the report card's intervals"


def test_links_point_to_files():
    for path in [*READMES, ROOT / "CONTRIBUTING.md", ROOT / "data/README.md"]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
