"""Labelled rows, what is trained of the model, and a classifier from file to answer."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import quick_arguments, read_lines
from transformers import AutoTokenizer, pipeline
from trl import ModelConfig

import stages
from sft.classify import classify, load_classifier
from sft.classify import main as classify_main
from sft.labels import Labelled, load_splits
from sft.metrics import measure_labels
from sft.train_classifier import ClassifierArguments, encode, load_base, main

SHARED = Path(__file__).parents[2] / "shared" / "data" / "classification"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")
WORDS = {"praise": "Lovely! Thank you.", "complaint": "Broken again. Bad.", "question": "When?"}


def write_rows(path, rows, ending="jsonl"):
    path = path.with_suffix(f".{ending}")
    if ending == "jsonl":
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    else:
        gap = "," if ending == "csv" else "\t"
        lines = [f"text{gap}label", *(f"{text}{gap}{label}" for text, label in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def make_rows(**counts):
    return [(f"No. {i}: {WORDS[label]}", label) for label, n in counts.items() for i in range(n)]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv"])
def test_rows_are_balanced_and_split(tmp_path, ending):
    file = write_rows(tmp_path / "x", make_rows(praise=60, complaint=50), ending)
    rows, summary = load_splits({"train": [file]})
    counts = {split: Counter(row.label for row in found) for split, found in rows.items()}
    assert counts == {
        "train": {"praise": 35, "complaint": 35}, "validation": {"praise": 5, "complaint": 5},
        "test": {"praise": 10, "complaint": 10},
    }  # fmt: skip
    assert summary.dropped == {"left out to balance the classes": 10}
    texts = [row.text for found in rows.values() for row in found]
    assert len(set(texts)) == 100
    shuffled = write_rows(tmp_path / "y", make_rows(complaint=50, praise=60)[::-1], ending)
    assert load_splits({"train": [shuffled]})[0] == rows
    assert load_splits({"train": [file]}, seed=1)[0] != rows
    unequal = load_splits({"train": [file]}, balance=False)[0]
    assert Counter(row.label for row in unequal["test"]) == {"praise": 12, "complaint": 10}


def test_duplicates_go_before_the_split(tmp_path):
    rows = make_rows(praise=20, complaint=20)
    again = [(f" {text.upper()}  ", label) for text, label in rows[:5]]
    contradicting = [("Hm", "praise"), ("hm ", "complaint")]
    file = write_rows(tmp_path / "x", [*rows, *again, *contradicting, ("", "praise"), ("x", "")])
    found, summary = load_splits({"train": [file]})
    assert sum(map(len, found.values())) == 40
    assert summary.rows_read == 49
    assert summary.dropped == {
        "no text": 1, "no label": 1, "a duplicate": 5, "the same text with another label": 2
    }  # fmt: skip


def test_a_named_test_file_stays_whole_and_leaves_the_training_rows(tmp_path):
    rows = make_rows(praise=30, complaint=20)
    file, held_out = write_rows(tmp_path / "x", rows), write_rows(tmp_path / "y", rows[:6])
    found, summary = load_splits({"train": [file], "test": [held_out]})
    assert Counter(row.label for row in found["test"]) == {"praise": 6}
    assert not {row.text for row in found["test"]} & {row.text for row in found["train"]}
    assert summary.dropped == {"a duplicate": 6, "left out to balance the classes": 4}
    assert summary.splits["train"] == {"complaint": 18, "praise": 18}


def test_rows_that_cannot_be_used_are_refused(tmp_path):
    def load(rows, **options):
        return load_splits({"train": [write_rows(tmp_path / "x", rows)]}, **options)

    with pytest.raises(ValueError, match="two labels or more, there is only .'praise'"):
        load(make_rows(praise=20))
    with pytest.raises(ValueError, match=r"x.jsonl:1: which column.*--text_column.*'text', 'lab"):
        load(make_rows(praise=20), columns=("body", None))
    with pytest.raises(ValueError, match="must be above 0 and leave something"):
        load(make_rows(praise=20), shares=(0.5, 0.5))
    other = write_rows(tmp_path / "y", make_rows(question=3))
    with pytest.raises(ValueError, match="test has labels that train does not have: .'question'"):
        file = write_rows(tmp_path / "x", make_rows(praise=20, complaint=20))
        load_splits({"train": [file], "test": [other]})


def test_metrics_by_hand():
    right = ["a", "a", "a", "b", "b", "c"]
    said = ["a", "a", "b", "b", "a", "a"]
    metrics = measure_labels(right, said, ["a", "b", "c"])
    matrix = metrics["confusion_matrix"]
    assert (matrix["labels"], matrix["n"]) == (["a", "b", "c"], 6)
    assert matrix["rows"] == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert metrics["accuracy"]["value"] == 0.5
    # a: precision 2/4, recall 2/3; b: 1/2 and 1/2; c is never said.
    assert metrics["f1/a"]["value"] == pytest.approx(4 / 7, abs=1e-6)
    assert metrics["f1/b"]["value"] == 0.5 and metrics["f1/c"]["value"] == 0
    assert metrics["f1"]["value"] == pytest.approx((4 / 7 + 0.5) / 3, abs=1e-6)
    assert metrics["f1"]["low"] < metrics["f1"]["value"] < metrics["f1"]["high"]


def trained_names(base_dir, **settings):
    peft = settings.pop("use_peft", False)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    model_args = ModelConfig(model_name_or_path=str(base_dir), use_peft=peft, lora_r=4)
    args = ClassifierArguments(**settings)
    model = load_base(base_dir, tokenizer, ["no", "yes"], args, model_args)
    return {name for name, one in model.named_parameters() if one.requires_grad}, model, tokenizer


def test_freezing_leaves_the_end_of_the_model(base_dir):
    names, model, tokenizer = trained_names(base_dir, freeze=True, max_length=20)
    parts = {"score.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert {name for name in names if ".h." not in name} == parts
    assert {name.split(".")[2] for name in names if ".h." in name} == {"1"}, "of 2 blocks the last"
    assert model.config.id2label == {0: "no", 1: "yes"} and tokenizer.model_max_length == 20
    assert len(tokenizer("mill " * 50, truncation=True)["input_ids"]) == 20


def test_lora_trains_the_head_too(base_dir):
    names, _, _ = trained_names(base_dir, use_peft=True)
    assert all("lora_" in name or "score" in name for name in names)
    assert any("score" in name for name in names) and any(".h.0." in name for name in names)
    with pytest.raises(ValueError, match="two ways to train less"):
        trained_names(base_dir, use_peft=True, freeze=True)
    with pytest.raises(ValueError, match="max_length=999: the model reads 64 tokens"):
        trained_names(base_dir, max_length=999)


@pytest.mark.parametrize("method", ["full", "freeze", "lora"])
def test_a_classifier_learns_and_loads_everywhere(base_dir, tmp_path, capsys, method):
    file = write_rows(tmp_path / "x", make_rows(praise=40, complaint=40, question=40))
    output = tmp_path / "out"
    args = ClassifierArguments([file], freeze=method == "freeze", max_length=32)
    settings = {"max_steps": 40, "learning_rate": 1e-2, "save_strategy": "no", "bf16": False}
    model_args = ModelConfig(model_name_or_path=str(base_dir), use_peft=method == "lora", lora_r=8)
    main(args, quick_arguments(output, **settings), model_args)
    metrics, record = (stages.read_json(output / f"{name}.json") for name in ("eval", "run"))
    assert record["finished"] and record["data"]["splits"]["test"] == dict.fromkeys(
        ("complaint", "praise", "question"), 8
    )
    assert metrics["accuracy"]["value"] > 0.9 and metrics["accuracy"]["n"] == 24
    assert sum(map(sum, metrics["confusion_matrix"]["rows"])) == 24
    assert (output / "adapter").is_dir() == (method == "lora")
    texts = ["No. 99: Lovely! Thank you.", "No. 1234: When?"]
    model, tokenizer = load_classifier(str(output))
    shares = classify(model, tokenizer, texts)
    # Alone or together, by this program or by transformers' own.
    assert classify(model, tokenizer, texts[:1])[0] == pytest.approx(shares[0], abs=1e-5)
    theirs = pipeline("text-classification", str(output), top_k=None, device="cpu")(texts)
    for own, other in zip(shares, theirs, strict=True):
        by_label = {one["label"]: one["score"] for one in other}
        named = [by_label[model.config.id2label[i]] for i in range(3)]
        assert own == pytest.approx(named, abs=1e-5)
    capsys.readouterr()
    classify_main(type("A", (), {"directory": str(output), "text": texts, "file": None}))
    said = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[2] for line in said] == texts and said[0][0] == "praise"


def test_labels_are_smoothed_where_the_recipe_says_so(base_dir, tmp_path):
    file = write_rows(tmp_path / "x", make_rows(praise=40, complaint=40))
    model_args, losses = ModelConfig(model_name_or_path=str(base_dir)), []
    for factor in (0.0, 0.5):
        changes = {"label_smoothing_factor": factor, "max_steps": 4, "save_strategy": "no"}
        settings = quick_arguments(tmp_path / "out", learning_rate=1e-2, bf16=False, **changes)
        main(ClassifierArguments([file], max_length=32), settings, model_args)
        lines = read_lines(tmp_path / "out/metrics.jsonl")
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert abs(losses[0][-1] - losses[1][-1]) > 0.01
    model_args.load_in_4bit = True
    with pytest.raises(ValueError, match="load_in_4bit=True, which this stage does not read"):
        main(ClassifierArguments([file]), settings, model_args)


def test_padding_does_not_change_a_label(base_dir):
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    _, model, _ = trained_names(base_dir)
    model.eval()
    texts = ["Thank you.", "The river runs past the mill. " * 4]
    with torch.no_grad():
        together = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        alone = model(**tokenizer(texts[:1], return_tensors="pt")).logits
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)


def test_a_control_token_in_a_text_is_text(base_dir):
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    ids = encode([Labelled("a<eos>b", "praise")], tokenizer, ["praise"])["input_ids"][0]
    assert tokenizer.eos_token_id not in ids and tokenizer.decode(ids) == "a<eos>b"


def test_a_model_without_a_head_is_refused(base_dir):
    with pytest.raises(ValueError, match="holds no classifier .score.weight is missing"):
        load_classifier(str(base_dir))


@needs_shared
def test_shared_files(tmp_path):
    sms = tmp_path / "sms.tsv"
    sms.symlink_to(SHARED / "SMSSpamCollection")
    rows, summary = load_splits({"train": [str(sms)]}, ("column_2", "column_1"))
    assert summary.rows_read == 5574 and summary.dropped["a duplicate"] >= 403
    assert len(rows["test"]) / sum(map(len, rows.values())) == pytest.approx(0.2, abs=0.01)
    files = {
        split: [str(SHARED / f"fewclue_eprstmt_{name}.json")]
        for split, name in (
            ("train", "train_few_all"), ("validation", "dev_few_all"), ("test", "test_public")
        )
    }  # fmt: skip
    rows, _ = load_splits(files)  # 29 and 25 texts stand twice in their files
    assert rows["train"][0] == Labelled(rows["train"][0].text, "Negative")
    assert [len(rows[split]) for split in ("train", "validation", "test")] == [126, 135, 610]


def test_the_embedded_corpus_has_three_splits(corpora_dir):
    files = {
        split: [str(corpora_dir / f"classification_{split}.csv")]
        for split in ("train", "validation", "test")
    }
    rows, summary = load_splits(files)
    assert set(summary.splits["test"]) == {"complaint", "praise", "question"}
    assert len(rows["test"]) == 150
