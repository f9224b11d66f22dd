"""Preferences, verifiable tasks and prompts of every layout."""

import json
from pathlib import Path

import pytest

from rlhf.data import load_preferences, load_prompts
from sft.data import split_rows
from sft.tasks import load_tasks

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")


def turn(role, content):
    return {"role": role, "content": content}


ASK = [turn("user", "Hi")]
GOOD, BAD = [turn("assistant", "Hello")], [turn("assistant", "Go")]
DEEP = [*ASK, turn("assistant", "Yes?"), turn("user", "Bye")]


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="x.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    ("layout", "row", "prompt"),
    [
        ("prompt/", {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}, ASK),
        ("prompt/", {"prompt": ASK, "chosen": GOOD, "rejected": BAD}, ASK),
        ("prompt/", {"prompt": "Hi", "chosen": ASK + GOOD, "rejected": ASK + BAD}, ASK),
        (
            "prompt/",
            {"prompt": "Hi", "system": "S", "chosen": "Hello", "rejected": "Go"},
            [turn("system", "S"), *ASK],
        ),
        (
            "prompt/",
            {"prompt": "Hi", "system": "S", "chosen": ASK + GOOD, "rejected": ASK + BAD},
            [turn("system", "S"), *ASK],
        ),
        ("chosen/rejected", {"chosen": DEEP + GOOD, "rejected": DEEP + BAD}, DEEP),
        (
            "ShareGPT",
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Hello"},
                "rejected": {"from": "gpt", "value": "Go"},
            },
            ASK,
        ),
        (
            "alpaca",
            {"instruction": "Hi", "input": "", "output": "x", "chosen": "Hello", "rejected": "Go"},
            ASK,
        ),
        (
            "HH",
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant: Hello",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant: Go",
            },
            DEEP,
        ),
    ],
)
def test_preference_layouts(write, layout, row, prompt):
    rows, summary = load_preferences(write({**row, "lang": "en"}))
    assert rows[0].pop("source").endswith("x.jsonl:1")
    assert rows == [{"lang": "en", "prompt": prompt, "chosen": GOOD, "rejected": BAD}]
    assert summary.layout.startswith(layout)
    prompts, _ = load_prompts(write({**row, "lang": "en"}))
    assert prompts == [{"lang": "en", "prompt": prompt}]


def test_hh_text_keeps_paragraphs_and_words(write):
    text = "\n\nHuman: Who is Human: me?\n\nAssistant: A\n\nB"
    rows, _ = load_preferences(write({"chosen": text, "rejected": text + " C"}))
    assert rows[0]["prompt"] == [turn("user", "Who is Human: me?")]
    assert rows[0]["chosen"] == [turn("assistant", "A\n\nB")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi", "chosen": "x", "rejected": "x"}, "chosen and rejected are equal"),
        ({"chosen": DEEP + GOOD, "rejected": DEEP + GOOD}, "chosen and rejected are equal"),
        ({"prompt": "Hi", "chosen": "x", "rejected": " "}, "empty turn of the assistant"),
        ({"prompt": " ", "chosen": "x", "rejected": "y"}, "empty turn of the user"),
        ({"chosen": DEEP + GOOD, "rejected": ASK + BAD}, "differ before the last turn"),
        ({"prompt": ASK + GOOD, "chosen": "x", "rejected": "y"}, "do not alternate"),
        ({"prompt": ASK, "chosen": ASK, "rejected": BAD}, "do not alternate"),
    ],
)
def test_refused_pairs_are_counted_with_their_sources(write, row, reason):
    good = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}
    rows, summary = load_preferences(write(good, row, row))
    ((found, sources),) = summary.dropped.items()
    assert reason in found
    assert [source.rsplit(":", 1)[1] for source in sources] == ["2", "3"]
    assert len(rows) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "chosen": "x"}, r"x.jsonl:1: no known layout.*\['prompt', 'chosen'\]"),
        ({"chosen": "x", "rejected": "y"}, r"x.jsonl:1: the row has no prompt.*'x'.*'prompt'"),
        ({"prompt": "Hi", "chosen": 7, "rejected": "y"}, r"x.jsonl:1: 'chosen' must be a list"),
    ],
)
def test_preferences_that_cannot_be_read(write, row, message):
    with pytest.raises(ValueError, match=message):
        load_preferences(write(row))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "Hi", "answer": "a|b", "verifier": "contains", "level": 2, "kind": "k"},
            ("a|b", "contains", 2, "k"),
        ),
        ({"prompt": ASK, "answer": "1,000"}, ("1,000", "number", 1, "x")),
        ({"prompt": "Hi", "answer": 7}, ("7", "number", 1, "x")),
        ({"prompt": "Hi", "answer": "abc", "level": "3"}, ("abc", "exact", 3, "x")),
        ({"question": "Hi", "answer": "1+1\n#### 1,234"}, ("1,234", "number", 1, "x")),
        ({"question": "Hi", "answer": "100-200"}, ("100-200", "exact", 1, "x")),
        ({"context": "Hi", "continuation": "-734"}, ("-734", "number", 1, "x")),
    ],
)
def test_tasks(write, row, expected):
    rows, _ = load_tasks(write({**row, "lang": "en"}))
    names = ("answer", "verifier", "level", "kind")
    assert rows == [{"lang": "en", "prompt": ASK, **dict(zip(names, expected, strict=True))}]


def test_aliases_join_the_answer(write):
    row = {"prompt": "Hi", "answer": "a", "aliases": ["a", "b"], "verifier": "contains"}
    assert load_tasks(write(row))[0][0]["answer"] == "a|b"


def test_tasks_from_a_table_without_header(tmp_path):
    (tmp_path / "mgsm.tsv").write_text("How many?\t18\nAnd now?\t-3\n", encoding="utf-8")
    rows, summary = load_tasks(str(tmp_path / "mgsm.tsv"))
    assert [row["answer"] for row in rows] == ["18", "-3"]
    assert rows[0]["prompt"] == [turn("user", "How many?")]
    assert "two columns" in summary.layout


def test_a_task_that_can_never_be_right_is_dropped(write):
    bad = {"prompt": "Hi", "answer": "maybe", "verifier": "yes_no"}
    rows, summary = load_tasks(write({"prompt": "Hi", "answer": "7"}, bad))
    assert len(rows) == 1
    assert list(summary.dropped) == ["the answer does not pass its own verifier 'yes_no'"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi"}, r"x.jsonl:1: no known layout"),
        ({"prompt": "a", "answer": "b", "verifier": ["exact"]}, r"x.jsonl:1: verifier=\['exact'\]"),
        (
            {"prompt": "a", "answer": "b", "verifier": "contains", "aliases": [4]},
            r"x.jsonl:1: aliases must be a list of texts, such as .*it is \[4\]",
        ),
        (
            {"prompt": "a", "answer": "b", "verifier": "contains", "aliases": "four"},
            r"x.jsonl:1: aliases must be a list of texts.*it is 'four'",
        ),
        ({"prompt": "a", "answer": "b", "verifier": "nmbr"}, r"x.jsonl:1: verifier='nmbr'.*exact"),
        ({"prompt": "a", "answer": ["b"]}, r"x.jsonl:1: field 'answer' must be a text or a number"),
        ({"prompt": "a", "answer": "b", "level": "easy"}, r"x.jsonl:1: level must be.*'easy'"),
        ({"question": 7, "answer": "b"}, r"x.jsonl:1: field 'question' must be a string"),
    ],
)
def test_tasks_that_cannot_be_read(write, row, message):
    with pytest.raises(ValueError, match=message):
        load_tasks(write(row))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi"},
        {"prompt": ASK},
        {"prompt": "Hi", "completion": "x"},
        {"prompt": "Hi", "answer": "7"},
        {"messages": ASK + GOOD},
        {"messages": ASK},
        {"question": "Hi", "answer": "x"},
        {"instruction": "Hi", "output": "x"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x"}]},
    ],
)
def test_prompts(write, row):
    rows, _ = load_prompts(write(row))
    assert rows == [{"prompt": ASK}]


def test_prompts_refuse_what_no_user_asked(write):
    rows, summary = load_prompts(write({"prompt": "Hi"}, {"messages": GOOD}))
    assert (len(rows), list(summary.dropped)) == (1, ["no messages"])
    with pytest.raises(ValueError, match=r"x.jsonl:1: no known layout.*\['text'\]"):
        load_prompts(write({"text": "x"}))


@needs_shared
@pytest.mark.parametrize(
    ("name", "layout", "kept", "dropped"),
    [
        (
            "instruction-data-with-preference.json", "alpaca preference", 1094,
            {"chosen and rejected are equal": 6},
        ),
        ("dpo_en_demo.json", "ShareGPT preference", 300, {}),
        ("dpo_zh_demo.json", "ShareGPT preference", 300, {}),
        (
            "hh_harmless_test.jsonl.gz", "HH", 2299,
            {
                "an empty turn of the assistant": 4,
                "user and assistant do not alternate": 4,
                "chosen and rejected differ before the last turn": 5,
            },
        ),
    ],
)  # fmt: skip
def test_shared_preferences(name, layout, kept, dropped):
    rows, summary = load_preferences(str(SHARED / "preference" / name))
    assert summary.layout.startswith(layout)
    assert len(rows) == kept
    assert summary.to_dict()["dropped"] == dropped
    assert all(len(row["chosen"]) == len(row["rejected"]) == 1 for row in rows)
    assert all(row["prompt"][-1]["role"] == "user" for row in rows)
    split_rows(rows, 0.1)


@needs_shared
@pytest.mark.parametrize(
    ("name", "layout", "kept", "first"),
    [
        ("gsm8k_test.jsonl", "question/answer", 1319, "18"),
        ("mgsm_zh.tsv", "two columns", 250, "18"),
        ("simple_arithmetic_nospaces.jsonl", "context/continuation", 1000, "-734"),
    ],
)
def test_shared_tasks(name, layout, kept, first):
    rows, summary = load_tasks(str(SHARED / "verifiable" / name))
    assert summary.layout.startswith(layout)
    assert len(rows) == summary.rows_read == kept
    assert rows[0]["answer"] == first
    assert {row["verifier"] for row in rows} == {"number"}
    assert {row["kind"] for row in rows} == {name.split(".")[0]}
    split_rows(rows, 0.1)
