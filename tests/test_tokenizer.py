"""The tokenizer: ids, digits, round trip, template."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, SENTENCES
from transformers import AutoTokenizer

from tokenizer.eval import HOSTILE, compare, detect_language, evaluate_tokenizer, load_tokenizer
from tokenizer.special_tokens import SPECIAL_TOKENS
from tokenizer.train import TokenizerArguments, main, train_bpe, wrap
from tokenizer.vocabulary import byte_of, entry_bytes, readable, write_vocabulary

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "I am LadderLM."},
    {"role": "user", "content": "你是谁？"},
    {"role": "assistant", "content": "我是天梯。"},
]


def test_special_tokens_have_their_ids(tokenizer):
    expected = ["<pad>", "<unk>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(list(range(6))) == expected
    for i, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer(token)["input_ids"] == [i]


def test_digits_stand_one_by_one(tokenizer):
    tokens = tokenizer.tokenize("in 2048, 十二 12")
    assert [t for t in tokens if any(c.isdigit() and c.isascii() for c in t)] == list("204812")


def test_round_trip_on_hostile_strings(tokenizer):
    path = ROOT.parent / "shared/data/messy/blns.json"
    strings = list(HOSTILE)
    if path.is_file():
        strings += json.loads(path.read_text(encoding="utf-8"))
    for text in strings:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


def test_template_renders_chatml(tokenizer):
    text = tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_generation_marks_hold_the_answer_and_its_end(tokenizer):
    encoded = tokenizer.apply_chat_template(
        MESSAGES, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    trained = tokenizer.decode([token for token, m in zip(ids, mask, strict=True) if m])
    assert trained == "I am LadderLM.<|im_end|>我是天梯。<|im_end|>"


def test_a_prompt_is_a_prefix_of_the_whole_conversation(tokenizer):
    prompt = tokenizer.apply_chat_template(MESSAGES[:4], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    assert whole[: len(prompt)] == prompt


def test_unknown_role_is_refused(tokenizer):
    assert tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False, tools=None)
    with pytest.raises(Exception, match="role 'tool' is not one of"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_the_same_bytes_in_give_the_same_files_out(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{one} {i}" for i in range(50) for one in SENTENCES), "utf-8")
    made = []
    for threads in ("1", "2"):  # and two hash seeds, in processes of their own
        out = tmp_path / threads
        command = [sys.executable, "-m", "tokenizer.train", "--data_files", str(text)]
        command += ["--vocab_size", "600", "--output_dir", str(out)]
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "eval.json")
        made.append([(out / name).read_bytes() for name in names])
    assert made[0] == made[1]


def test_other_encodings_and_bad_rows_are_read_as_by_prepare(tmp_path, capsys):
    text = [f"小河流过村庄。The river {i} runs past the village." for i in range(200)]
    (tmp_path / "a.txt").write_text("\n".join(text), encoding="gbk")
    rows = [json.dumps({"text": line}, ensure_ascii=False) for line in text]
    rows[7] = '{"text": '
    (tmp_path / "b.jsonl").write_text("\n".join(rows), encoding="utf-8")
    out = tmp_path / "out"
    given = {"output_dir": str(out), "vocab_size": 400}
    for name, message, mended in (
        ("a.txt", "a.txt:1: not UTF-8", {"encoding": "gbk"}),
        ("b.jsonl", "b.jsonl:8", {"on_bad_row": "skip"}),
    ):
        given["data_files"] = [str(tmp_path / name)]
        with pytest.raises(ValueError, match=message):
            main(TokenizerArguments(**given))
        main(TokenizerArguments(**given | mended))
        vocabulary = AutoTokenizer.from_pretrained(out).get_vocab()
        assert any("小河" in readable(entry) for entry in vocabulary)
    assert json.loads((out / "run.json").read_text())["data"] == {
        "documents": 199, "bytes": len("".join(text[:7] + text[8:]).encode()), "halved_runs": 0,
        "bad_rows": 1,
    }  # fmt: skip
    assert (out / "bad_rows.txt").read_text(encoding="utf-8").count("\n") == 1
    assert "1 rows could not be read and were left out" in capsys.readouterr().out


def test_a_text_of_nothing_makes_no_tokenizer(tmp_path):
    rows = {"query": '{"query": "The river", "label": 1}\n' * 50, "blank": '{"text": " "}\n' * 50}
    for name, content in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(content, encoding="utf-8")
    out = tmp_path / "out"

    def run(name, **given):
        given |= {"data_files": [str(tmp_path / f"{name}.jsonl")], "output_dir": str(out)}
        main(TokenizerArguments(vocab_size=300, **given))

    with pytest.raises(ValueError, match=r"query.jsonl:1: no field text.*Pass --text_field NAME"):
        run("query")
    with pytest.raises(ValueError, match=r"query.jsonl: none of its 50 rows can be read.*no field"):
        run("query", on_bad_row="skip")
    with pytest.raises(ValueError, match="has no document: all rows are without text"):
        run("blank")
    assert not (out / "tokenizer.json").exists()
    run("query", text_field="query")
    assert json.loads((out / "run.json").read_text())["data"]["documents"] == 50


def test_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size 200 is too small: 266"):
        train_bpe(SENTENCES, 200, 16)


def test_evaluation_counts_bytes_by_language(tokenizer):
    metrics = evaluate_tokenizer(tokenizer, {"en": ["The river"], "zh": ["小河"]})
    tokens = len(tokenizer("The river")["input_ids"])
    assert metrics["bytes_per_token/en"]["value"] == pytest.approx(9 / tokens, abs=1e-4)
    assert metrics["round_trip"] == {"value": 1.0, "n": 2, "unit": "share"}
    tokens = len(tokenizer("小河")["input_ids"])
    assert metrics["characters_per_token/zh"]["value"] == pytest.approx(2 / tokens, abs=1e-4)
    assert metrics["round_trip/hostile"] == {"value": 1.0, "n": len(HOSTILE), "unit": "share"}


def test_bytes_of_characters_are_counted_apart():
    plain = wrap(train_bpe(["河"], 266, 16), 128)  # bytes alone, no merges
    metrics = evaluate_tokenizer(plain, {"zh": ["河a1 "]})
    assert metrics["bytes_per_token/zh"]["value"] == 1.0
    assert metrics["single_byte_tokens"]["value"] == 0.5  # of 河's three bytes and three ASCII


def test_a_vocabulary_is_readable(tokenizer, tmp_path):
    assert bytes(byte_of().values()) and sorted(byte_of().values()) == list(range(256))
    assert readable("ä½ł") == "你" and readable("Ġthe") == " the"
    assert readable("ä½") == "<E4BD>" and readable("æĺ¯ä½") == "是<E4BD>"
    assert readable("<|im_start|>") == "<|im_start|>"
    for text in ("小河", "é 🪜", "\x00\n"):
        entries = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        assert b"".join(map(entry_bytes, entries)) == text.encode()
    write_vocabulary(tokenizer, {tokenizer.convert_tokens_to_ids("ä"): 7}, tmp_path / "v.tsv")
    lines = (tmp_path / "v.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    assert len(rows) == len(tokenizer) + 1 and rows[0] == ["id", "kind", "used", "entry"]
    assert rows[1] == ["0", "special", "0", '"<pad>"']
    table = {row[3]: row for row in rows[1:]}
    assert table['"<E4>"'][1:3] == ["byte", "7"]
    assert any(row[1] == "text" and "河" in row[3] for row in rows), "Chinese entries as text"


def test_tokenizers_are_compared_on_the_same_text(tokenizer, tmp_path):
    # GPT-2's two files, under the names that OpenAI gave them, with one merge.
    vocabulary = {char: i for i, char in enumerate(byte_of())} | {"th": 256}
    (tmp_path / "encoder.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nt h\n", encoding="utf-8")
    other = load_tokenizer(str(tmp_path))
    assert len(other("the")["input_ids"]) == 2
    text = tmp_path / "held_out.txt"
    text.write_text("小河流过磨坊", encoding="utf-8")
    table = compare({"mine": tokenizer, "theirs": other}, [str(text)])
    mine = len(tokenizer("小河流过磨坊")["input_ids"])
    row = next(line for line in table.splitlines() if line.startswith("held_out.txt zh: tokens"))
    assert row.split()[3:] == [str(mine), "18", f"x{18 / mine:.2f}"]
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path / ".."))


@pytest.mark.parametrize(
    ("message", "options", "why"),
    [
        ({"content": "x"}, {"tools": [{"type": "function"}]}, "tools are not supported"),
        ({"content": None}, {}, "content of a turn of the assistant must be a text"),
        ({"content": [{"type": "text", "text": "x"}]}, {}, "must be a text"),
        ({"content": "x", "tool_calls": [{"name": "f"}]}, {}, "must be a text"),
    ],
)
def test_what_the_template_cannot_say_is_refused(tokenizer, message, options, why):
    with pytest.raises(Exception, match=why):
        tokenizer.apply_chat_template([{"role": "assistant", **message}], **options)


@pytest.mark.parametrize(
    ("text", "language"),
    [("The river", "en"), ("小河流过", "zh"), ("LadderLM 是一个小模型", "zh"), ("48", "en")],
)
def test_language(text, language):
    assert detect_language(text) == language


def test_saved_tokenizer_loads_with_transformers_alone(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    code = (
        "import sys; sys.path = [p for p in sys.path if p]\n"
        "from transformers import AutoTokenizer\n"
        f"t = AutoTokenizer.from_pretrained({str(tmp_path)!r})\n"
        "assert 'tokenizer.train' not in sys.modules\n"
        "print(t.decode(t('河 42')['input_ids']), t.pad_token_id, t.eos_token_id)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert out.stdout.split() == ["河", "42", "0", "3"], out.stderr
