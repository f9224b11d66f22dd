"""The tokenizer: ids, digits, round trip, template."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, SENTENCES

from tokenizer.eval import detect_language, evaluate_tokenizer
from tokenizer.special_tokens import SPECIAL_TOKENS
from tokenizer.train import train_bpe

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
    strings = [" lead", "tab\tnew\n\nline \r\n", "\x00\ufeff", "🪜👩‍👩‍👧", "ｆｕｌｌ", "a" * 300]
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
    with pytest.raises(Exception, match="role 'tool' is not one of"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_training_is_deterministic():
    first, second = (train_bpe(SENTENCES, 400, 16).to_str() for _ in range(2))
    assert first == second


def test_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size 200 is too small: 266"):
        train_bpe(SENTENCES, 200, 16)


def test_evaluation_counts_bytes_by_language(tokenizer):
    metrics = evaluate_tokenizer(tokenizer, {"en": ["The river"], "zh": ["小河"]})
    tokens = len(tokenizer("The river")["input_ids"])
    assert metrics["bytes_per_token/en"]["value"] == pytest.approx(9 / tokens, abs=1e-4)
    assert metrics["round_trip"] == {"value": 1.0, "n": 2, "unit": "share"}


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
