"""Layouts, refusals, loss weights, mixtures and the split."""

import json
from pathlib import Path

import pytest

from sft.data import load_conversations, load_mixture, split_rows

SHARED = Path(__file__).parents[2] / "shared" / "data" / "sft"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")

def turn(role, content):
    return {"role": role, "content": content}


HI = [turn("user", "Hi"), turn("assistant", "Hello")]


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="x.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    ("layout", "row", "messages"),
    [
        ("messages", {"messages": HI}, HI),
        (
            "messages",
            {
                "messages": [
                    {**turn("user", [{"type": "text", "value": "Hi"}]), "loss_weight": 0.0},
                    {
                        **turn("assistant", [{"type": "text", "text": "Hel"}, {"text": "lo"}]),
                        "loss_weight": 1.0,
                    },
                ]
            },
            HI,
        ),
        (
            "ShareGPT",
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ],
                "system": "Be kind",
                "tools": "[]",
            },
            [turn("system", "Be kind"), *HI],
        ),
        ("messages", {"messages": [turn("system", ""), *HI]}, HI),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}, HI),
        (
            "alpaca",
            {
                "instruction": "Add",
                "input": "1 2",
                "output": "3",
                "history": [["Hi", "Hello"]],
                "system": "S",
            },
            [turn("system", "S"), *HI, turn("user", "Add\n1 2"), turn("assistant", "3")],
        ),
        ("prompt/completion", {"prompt": "Hi", "completion": "Hello"}, HI),
        ("prompt/completion", {"prompt": HI[:1], "completion": HI[1:]}, HI),
        ("question/answer", {"question": "Hi", "answer": "Hello"}, HI),
    ],
)
def test_layouts(write, layout, row, messages):
    rows, summary = load_conversations(write({**row, "kind": "greeting", "lang": "en"}))
    assert rows == [{"kind": "greeting", "lang": "en", "messages": messages}]
    assert summary.layout.startswith(layout)
    assert (summary.rows_read, summary.rows_kept, summary.dropped) == (1, 1, {})


TOOLS = "tool calls are not supported"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [HI[0], {"role": "function_call", "content": "{}"}, HI[1]]}, TOOLS),
        ({"conversations": [{"from": "observation", "value": "{}"}]}, TOOLS),
        ({"messages": HI, "tools": '[{"name": "f"}]'}, TOOLS),
        ({"messages": [HI[0], {**turn("assistant", None), "tool_calls": [{}]}]}, TOOLS),
        ({"messages": [HI[0], turn("assistant", [{"type": "tool_use"}])]}, TOOLS),
        ({"messages": [turn("user", [{"type": "image"}]), HI[1]]}, "content of type 'image'"),
        ({"messages": []}, "no messages"),
        ({"messages": HI[:1]}, "last turn is not of the assistant"),
        ({"messages": [HI[1]]}, "first turn is not of the user"),
        ({"messages": [HI[0], *HI]}, "do not alternate"),
        ({"messages": [*HI, turn("system", "S"), *HI]}, "do not alternate"),
        ({"messages": [HI[0], turn("assistant", " \n")]}, "empty turn of the assistant"),
        ({"messages": [turn("user", ""), HI[1]]}, "empty turn of the user"),
        ({"instruction": "Hi", "output": ""}, "empty turn of the assistant"),
        ({"messages": [{**HI[0], "weight": 1}, HI[1]]}, "a loss weight on a turn of the user"),
    ],
)
def test_refused_rows_are_counted_with_reason_and_source(write, row, reason):
    rows, summary = load_conversations(write({"messages": HI}, row, row))
    assert len(rows) == summary.rows_kept == 1
    ((found, sources),) = summary.dropped.items()
    assert reason in found
    assert [source.rsplit(":", 1)[1] for source in sources] == ["2", "3"]
    assert f"2 x {found} (first: " in str(summary)
    assert summary.to_dict()["dropped"] == {found: 2}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "Hi", "a": "b"}, r"x.jsonl:2: no known layout.*\['q', 'a'\].*example(.|\n)*alpaca"),
        ({"instruction": "Hi", "output": None}, r"x.jsonl:2: no known layout.*\['instruction'\]"),
        ({"messages": "Hi"}, r"x.jsonl:2: 'messages' must be a list"),
        ({"messages": ["Hi"]}, r"x.jsonl:2: a message must have 'role'.*'Hi'"),
        ({"messages": [{"role": "user"}]}, r"x.jsonl:2: a message must have 'role'"),
        ({"messages": [7]}, r"x.jsonl:2: a message must have 'role'"),
        ({"messages": [turn("narrator", "x")]}, r"x.jsonl:2: unknown role 'narrator'.*human"),
        ({"messages": [turn("user", 7)]}, r"x.jsonl:2: content must be a text.*it is 7"),
        ({"messages": [turn("user", [{"x": 1}])]}, r"x.jsonl:2: content must be a text"),
        ({"instruction": 7, "output": "x"}, r"x.jsonl:2: field 'instruction' must be a string"),
        ({"instruction": "a", "output": "x", "history": ["a"]}, r"x.jsonl:2: history must be"),
        ({"instruction": "a", "output": "x", "history": [["a", 7]]}, r"x.jsonl:2: history .*, 7\]"),
        ({"instruction": "a", "output": "x", "history": 7}, r"x.jsonl:2: history must.*has 7"),
        ({"messages": [turn(["user"], "x")]}, r"x.jsonl:2: unknown role \['user'\].*such as"),
        ({"messages": [turn({"a": 1}, "x")]}, r"x.jsonl:2: unknown role {'a': 1}"),
        ({"conversations": [{"from": [], "value": ""}]}, r"x.jsonl:2: unknown role \[\].*\"from\""),
    ],
)
def test_rows_that_cannot_be_read(write, row, message):
    with pytest.raises(ValueError, match=message):
        load_conversations(write({"messages": HI}, row))


def test_nothing_left(write):
    with pytest.raises(ValueError, match=r"no row is left(.|\n)*1 x the last turn"):
        load_conversations(write({"messages": HI[:1]}))


def test_several_layouts_are_said(write):
    _, summary = load_conversations(write({"messages": HI}, {"question": "a", "answer": "b"}))
    assert summary.layout == "messages (role, content): 1 rows; question/answer: 1 rows"


def test_split_keeps_a_prompt_on_one_side():
    rows = [
        {"messages": [turn("user", f"q{number % 500}"), turn("assistant", f"a{number}")]}
        for number in range(1000)
    ]
    train, validation = split_rows(rows, 0.1)
    asked = [{row["messages"][0]["content"] for row in side} for side in (train, validation)]
    assert not asked[0] & asked[1]
    assert 25 < len(asked[1]) < 80
    assert len(train) + len(validation) == 1000
    again = split_rows(rows[::-1], 0.1)[1]
    assert {row["messages"][0]["content"] for row in again} == asked[1]
    system = [{"messages": [turn("system", "S"), *row["messages"]]} for row in rows]
    assert len(split_rows(system, 0.1)[1]) == len(validation)
    assert len(split_rows([{"prompt": row["messages"][:1]} for row in rows], 0.1)[1]) == len(
        validation
    )
    with pytest.raises(ValueError, match="validation side is empty|train side is empty"):
        split_rows(rows[:1], 0.5)
    with pytest.raises(ValueError, match="validation_share=2 must lie"):
        split_rows(rows, 2)


@needs_shared
@pytest.mark.parametrize(
    ("name", "layout", "kept", "dropped"),
    [
        ("instruction-data.json", "alpaca", 1100, {}),
        ("alpaca_en_demo.json", "alpaca", 999, {}),
        ("alpaca_zh_demo.json", "alpaca", 1000, {}),
        ("v1_sft_demo.jsonl", "messages", 500, {}),
        ("dummy_conversation.json", "ShareGPT", 500, {}),
        ("glaive_toolcall_zh_demo.json", "ShareGPT", 100, {TOOLS: 200}),
    ],
)
def test_shared_files(name, layout, kept, dropped):
    rows, summary = load_conversations(str(SHARED / name))
    assert summary.layout.startswith(layout)
    assert len(rows) == kept
    assert summary.to_dict()["dropped"] == dropped
    assert summary.rows_read == kept + sum(dropped.values())
    split_rows(rows, 0.1)


def test_loss_weights_of_turns_and_rows_multiply(write):
    weighed = [HI[0], {**HI[1], "loss_weight": 0.5}]
    rows, summary = load_conversations(
        write(
            {"messages": weighed},
            {"messages": weighed, "loss_weight": 3},
            {"instruction": "Hi", "output": "Hello", "loss_weight": 0.0},
            {"messages": [{**HI[0], "weight": 0}, {**HI[1], "weight": 1}]},
        )
    )
    assert [row["messages"][1].get("loss_weight") for row in rows] == [0.5, 1.5, 0.0, None]
    assert not any("loss_weight" in row for row in rows)
    assert summary.rows_kept == 4
    for bad in (-1, "1", True, float("nan")):
        with pytest.raises(ValueError, match="x.jsonl:1: loss_weight must be a number, 0 or more"):
            load_conversations(write({"messages": [HI[0], {**HI[1], "loss_weight": bad}]}))


def test_a_mixture_has_its_shares_and_repeats_nothing(write):
    def make(name, count):
        rows = [{"messages": [turn("user", f"{name}{i}"), HI[1]]} for i in range(count)]
        return write(*rows, name=f"{name}.jsonl")

    large, small = make("large", 90), make("small", 10)
    rows, summary = load_mixture([f"{large}@3", f"{small}@1"])
    asked = [row["messages"][0]["content"] for row in rows]
    assert len(set(asked)) == len(asked) == 40
    assert sum(text.startswith("large") for text in asked) == 30
    assert (summary.rows_read, summary.rows_kept) == (100, 40)
    assert summary.to_dict()["dropped"] == {"more than a share of 75% of the rows": 60}
    assert load_mixture([f"{large}@3", f"{small}@1"])[0] == rows
    other = load_mixture([f"{large}@3", f"{small}@1"], seed=1)[0]
    assert other != rows and len(other) == 40
    assert len(load_mixture([large, small])[0]) == 100


def test_three_way_split():
    rows = [{"messages": [turn("user", f"q{number}"), HI[1]]} for number in range(2000)]
    train, validation, test = split_rows(rows, 0.05, 0.1)
    assert len(train) + len(validation) + len(test) == 2000
    assert 70 < len(validation) < 130 and 160 < len(test) < 240
    assert split_rows(rows, 0.05)[1] == validation
