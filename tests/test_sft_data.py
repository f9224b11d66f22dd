"""Layouts, refusals, the split, and the rendering with its mask."""

import json
from pathlib import Path

import pytest

from sft.data import check_chat_template, load_conversations, render, split_rows

SHARED = Path(__file__).parents[2] / "shared" / "data" / "sft"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


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


@pytest.fixture
def tokenizer():
    """Bytes as tokens, with the merges of nothing: every length is known by hand."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(special + alphabet)}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", chat_template=CHATML,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip


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
        ({"messages": [HI[0], {**HI[1], "loss_weight": 0.0}]}, "loss_weight other than 1"),
        ({"messages": [{**HI[0], "weight": 1}, HI[1]]}, "weight other than 0"),
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


def test_render_trains_the_answer_and_its_end_token_only(tokenizer):
    two_turns = [*HI, turn("user", "再见"), turn("assistant", "再见!")]
    kept, summary = render([{"messages": HI, "kind": "x"}, {"messages": two_turns}], tokenizer, 99)
    assert list(kept[0]) == ["input_ids", "assistant_masks"]
    trained = [
        tokenizer.decode(
            [token for token, bit in zip(*row.values(), strict=True) if bit],
            skip_special_tokens=False,
        )
        for row in kept
    ]
    assert trained == ["Hello<|im_end|>", "Hello<|im_end|>再见!<|im_end|>"]
    # 2 turns of <|im_start|>, role, newline, text, <|im_end|>, newline; a byte is a token.
    assert len(kept[0]["input_ids"]) == 2 * 4 + len("user" + "Hi" + "assistant" + "Hello")
    assert summary.tokens == sum(len(row["input_ids"]) for row in kept)
    assert summary.trained_tokens == 6 + 6 + len("再见!".encode()) + 1
    assert summary.longest == len(kept[1]["input_ids"])
    assert summary.end_share == 1.0
    assert "end token trained in 100.0% of the rows" in str(summary)


def test_render_drops_and_counts(tokenizer):
    fake_end = [turn("user", "Hi<|im_end|>"), HI[1]]
    long = [turn("user", "Hi " * 50), HI[1]]
    rows = [{"messages": messages} for messages in (HI, fake_end, long)]
    kept, summary = render(rows, tokenizer, 28)
    assert len(kept) == 1
    assert list(summary.dropped) == [
        "the text holds a special token", "longer than max_length=28 tokens"
    ]  # fmt: skip
    assert summary.dropped["longer than max_length=28 tokens"][0].startswith("row 3, 'Hi Hi")
    with pytest.raises(ValueError, match=r"no row is left(.|\n)*longer than max_length=27"):
        render(rows[:1], tokenizer, 27)


def test_render_over_several_batches(tokenizer):
    rows = [
        {"messages": [turn("user", "q"), turn("assistant", f"answer {number}")]}
        for number in range(600)
    ]
    kept, _ = render(rows, tokenizer, 99)
    assert "answer 599" in tokenizer.decode(kept[599]["input_ids"])
    assert len(kept) == 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template": None}, "has no chat template"),
        (
            {"chat_template": CHATML.replace("{% generation %}", "").replace(
                "{% endgeneration %}", "")},
            r"no \{% generation %\} marks",
        ),
        (
            {"chat_template": CHATML.replace(" + '<|im_end|>' }}{% endgeneration %}",
                                             " }}{% endgeneration %}<|im_end|>")},
            r"trains 'Hello'.*without an end token",
        ),
        ({"pad_token": "<eos>"}, r"pad_token='<eos>' must be set and differ from eos_token"),
        ({"pad_token": None}, r"pad_token=None must be set"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_trained_on(tokenizer, change, message):
    for name, value in change.items():
        setattr(tokenizer, name, value)
    with pytest.raises(ValueError, match=message):
        render([{"messages": HI}], tokenizer, 99)


def test_check_chat_template_returns_the_end_of_the_turn(tokenizer):
    assert check_chat_template(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_project_template_passes(tokenizer):
    path = Path(__file__).parents[1] / "tokenizer" / "chat_template.jinja"
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    assert check_chat_template(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


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
