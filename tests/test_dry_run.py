"""`--dry_run`: each stage up to its first optimizer step, and nothing written."""

import json
import re
import shutil
import sys

import pytest
import torch
from conftest import SENTENCES
from datasets import Dataset

import stages
from commandline import take_dry_run
from pretrain.dry_run import describe_gradient, measure_rows
from pretrain.hardware import training_defaults


@pytest.mark.parametrize(
    ("argv", "rest", "asked"),
    [
        (["--dry_run"], [], True),
        (["--dry_run", "--seed", "1"], ["--seed", "1"], True),
        (["--a", "b", "--dry_run", "true"], ["--a", "b"], True),
        (["--dry_run=false", "--seed", "1"], ["--seed", "1"], False),
        (["--dry_run", "False"], [], False),
        (["--name", "true"], ["--name", "true"], False),
    ],
)
def test_the_flag_is_taken_off(argv, rest, asked):
    assert take_dry_run(argv) == (rest, asked)


def run(module, monkeypatch, capsys, *words):
    """main of a stage, as its command would call it with --dry_run; what it printed."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words), "--dry_run"])
    classes = [kind for name, kind in module.main.__annotations__.items() if name != "return"]
    defaults = training_defaults() if ".train" in module.__name__ else None
    quick = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    if len(classes) == 1:
        defaults, quick = None, {}
    parsed = stages.parse_args(classes, defaults=defaults | quick if defaults else None)
    with pytest.raises(SystemExit) as end:
        module.main(*parsed)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_pretraining_stops_before_its_first_step(prepared_dir, tmp_path, monkeypatch, capsys):
    import pretrain.train

    monkeypatch.chdir(tmp_path)
    data = tmp_path.parent / f"{tmp_path.name}-prepare"
    shutil.copytree(prepared_dir, data)
    stages.write_json(data / "meta.json", {"block_size": 32, "train": {"tokens": 2560}})
    sizes = json.dumps({"n_layer": 1, "n_embd": 32, "n_head": 2})
    shown = run(
        pretrain.train, monkeypatch, capsys, "--data_dir", data, "--config_overrides",
        sizes, "--max_steps", 7, "--per_device_train_batch_size", 4, "--output_dir", "out",
        "--gradient_accumulation_steps", 2, "--use_cpu", "true",
    )  # fmt: skip
    assert "pretrain: dry run, nothing was written" in shown
    assert "8 a step = 4 x 2 accumulated x 1 process(es)" in shown
    assert "steps              7\n" in shown
    assert list(tmp_path.iterdir()) == []


def test_sft_and_dpo_stop_before_their_first_step(base_dir, tmp_path, monkeypatch, capsys):
    import rlhf.train_dpo
    import sft.train

    monkeypatch.chdir(tmp_path)
    turns = [("Who are you?", "I am LadderLM."), ("你是谁？", "我是天梯。")] * 20
    chats = [
        {"messages": [{"role": "user", "content": f"{q} {i}"}, {"role": "assistant", "content": a}]}
        for i, (q, a) in enumerate(turns)
    ]
    for number in (4, 17, 29):  # wherever the split is, training has one
        chats[number]["messages"][0]["content"] = f"Who are you, and who is {number}?"
    pairs = [
        {"prompt": row["messages"][:1], "chosen": "I am LadderLM.", "rejected": "No."}
        for row in chats
    ]
    for name, rows in (("chats", chats), ("pairs", pairs)):
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    for module, data, stage in ((sft.train, "chats", "sft"), (rlhf.train_dpo, "pairs", "dpo")):
        shown = run(
            module, monkeypatch, capsys, "--model_name_or_path", base_dir, "--data_files",
            f"{data}.jsonl", "--output_dir", "out", "--max_length", 64, "--use_cpu", "true",
            "--per_device_train_batch_size", 4, "--max_steps", 3, "--bf16", "false",
            "--validation_share", 0.2,
        )  # fmt: skip
        assert f"{stage}: dry run, nothing was written" in shown
        assert "4 a step = 4 x 1 accumulated" in shown and "computed in fp32" in shown
        assert int(re.search(r"\n  rows +(\d+)\n", shown)[1]) > 20, "not the four that are tried"
        assert int(re.search(r"the longest rows, up to (\d+) tokens", shown)[1]) > 31
    assert sorted(tmp_path.iterdir()) == before


def test_tokenizer_and_prepare_read_and_write_nothing(
    base_dir, tmp_path, monkeypatch, capsys
):
    import pretrain.prepare
    import tokenizer.train

    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES), encoding="utf-8")
    shown = run(tokenizer.train, monkeypatch, capsys, "--data_files", text, "--output_dir", "out")
    assert "in 1 documents" in shown and "tokenizer: dry run" in shown
    shown = run(
        pretrain.prepare, monkeypatch, capsys, "--data_files", text, "--tokenizer", base_dir,
        "--output_dir", "out",
    )  # fmt: skip
    assert "prepare: dry run" in shown
    assert list(tmp_path.iterdir()) == [text]


def test_rows_are_as_long_as_what_a_batch_of_them_takes():
    ids = {"input_ids": [[1] * 3, [1], [1] * 7]}
    assert measure_rows(Dataset.from_dict(ids)).tolist() == [3, 1, 7]
    assert measure_rows(Dataset.from_dict(ids).select([2, 0])).tolist() == [7, 3]
    sides = {"chosen_ids": [[1] * 5, [1]], "rejected_ids": [[], [1] * 2]}
    pairs = {"prompt_ids": [[1], [1] * 4]} | sides
    assert measure_rows(Dataset.from_dict(pairs)).tolist() == [6, 6]
    assert measure_rows(Dataset.from_dict({"prompt": ["Who are you?"]})) is None


def test_a_gradient_that_is_not_finite_is_refused():
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    model.bias.grad.fill_(3.0)
    assert describe_gradient(model) == "norm 3.317"  # sqrt(1 + 1 + 9)
    model.bias.grad.fill_(float("nan"))
    with pytest.raises(ValueError, match="norm nan: one step would spoil the model"):
        describe_gradient(model)
    model.zero_grad(set_to_none=False)
    assert "this batch teaches nothing" in describe_gradient(model)
