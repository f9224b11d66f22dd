"""tiktoken gives the ids of `tokenizers`, for every text, or is not used."""

import json
import random
from unicodedata import category

import pytest
from conftest import SENTENCES
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pretrain.encoding import Encoding, encode, name_encoder
from pretrain.fast_bpe import APART, FastBPE
from tokenizer.train import train_bpe

CODE = "x = {\n\t'a':  1,\n\n}\r\n"
TEXTS = [*SENTENCES, "it's we'll THEY'RE 'd 's5 '5s", "aaaaaaaaaaaaaab", CODE]


def train_like_gpt2():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    bpe.train_from_iterator(TEXTS * 20, trainer)
    return bpe


@pytest.fixture(scope="module", params=["digits apart", "gpt2"])
def bpe(request):
    if request.param == "gpt2":
        bpe = train_like_gpt2()
    else:
        bpe = train_bpe(TEXTS * 20, vocab_size=600, max_token_length=16)
    bpe.encode_special_tokens = True
    return bpe


def assert_equal(bpe, texts):
    fast = FastBPE(bpe)
    encoded = bpe.encode_batch_fast(texts, add_special_tokens=False)
    for text, expected in zip(texts, encoded, strict=True):
        assert fast.encode(text).tolist() == expected.ids, repr(text[:80])


def test_every_character_among_others(bpe):
    """Those that tiktoken is given, each beside letters, digits, blanks and itself."""
    shown = [char for char in map(chr, range(0x110000)) if category(char) not in ("Cs", "Co")]
    around = [f"a{c}b {c}{c} 1{c} \n{c}" for c in shown if not APART.search(c)]
    assert_equal(bpe, ["".join(around[i : i + 100]) for i in range(0, len(around), 100)])


@pytest.mark.parametrize("blank", [" ", "\n", "\u3000", " \t"])
@pytest.mark.parametrize("length", [2, 9_999, 200_000])
def test_blanks_without_end(bpe, blank, length):
    run = blank * (length // len(blank))
    assert_equal(bpe, [run, f"{run}x", f"x{run}1", f"x{run}!{run}"])


def test_words_without_end(bpe):
    assert_equal(bpe, [part * 50_000 for part in ("a", "小河", "12", "'", "<eos>")] + [""])


def test_any_order_of_the_corpus_letters(bpe):
    draw = random.Random(0)
    letters = [*"".join(TEXTS), *"  \n''", "ing", "the", "'s"]
    assert_equal(bpe, ["".join(draw.choices(letters, k=60)) for _ in range(5_000)])


def tokenizer_with(*merges):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, *dict.fromkeys("".join(pair) for pair in merges)]
    bpe = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, list(merges)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return bpe


def test_an_entry_that_no_text_reaches_is_refused():
    """`abc` from ab and c, although bc comes first: tiktoken would put a and bc together."""
    bpe = tokenizer_with(("b", "c"), ("a", "b"), ("ab", "c"))
    assert bpe.encode("abc").tokens == ["a", "bc"]
    with pytest.raises(ValueError, match="not in the order in which a training makes them"):
        FastBPE(bpe)


def test_one_entry_of_two_merges_is_refused():
    with pytest.raises(ValueError, match="not in the order"):
        FastBPE(tokenizer_with(("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")))


@pytest.mark.parametrize(
    ("part", "value", "why"),
    [
        ("normalizer", {"type": "NFC"}, "normalizes"),
        ("pre_tokenizer", {"type": "Whitespace"}, "splits texts otherwise"),
        ("pre_tokenizer", None, "splits texts otherwise"),
        ("model", {"ignore_merges": True}, "not plain"),
        ("model", {"dropout": 0.1}, "not plain"),
    ],
)
def test_what_does_more_is_refused(part, value, why):
    state = json.loads(train_like_gpt2().to_str())
    state[part] = state[part] | value if part == "model" else value
    with pytest.raises(ValueError, match=why):
        FastBPE(Tokenizer.from_str(json.dumps(state)))


def test_an_added_word_is_refused():
    bpe = train_like_gpt2()
    bpe.add_tokens(["river"])
    with pytest.raises(ValueError, match="added tokens that are not special"):
        FastBPE(bpe)


def test_prepare_encodes_with_either(tmp_path, bpe):
    """The same ids, and what encoded is named."""
    found, nothing = [], {"normalizer": {"type": "Sequence", "normalizers": []}}
    for name, more in (("fast", {}), ("slow", nothing)):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(json.loads(bpe.to_str()) | more), encoding="utf-8")
        encoding = Encoding(str(file), 0, 1)
        done = encode([*TEXTS, "", "\U00011de0\U0001f600"], encoding)
        found.append((done.ids.tolist(), done.lengths.tolist(), done.ids.dtype))
        wanted = {"fast": "tiktoken", "slow": "tokenizers: it normalizes"}[name]
        assert name_encoder(encoding).startswith(wanted)
    assert found[0] == found[1]


def test_what_goes_apart_is_rare():
    assert not any(APART.search(text) for text in [*TEXTS, "😀 🇨🇳 𠮷", " " * 9_999])
    assert APART.search("𝔸") and APART.search("\n" * 10_000)
