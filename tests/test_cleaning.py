"""What the filters see, and how duplicates are found."""

import json

import numpy as np
import pytest

from pretrain.cleaning import Cleaner, CleaningArguments, check_cleaning, hash_evaluation
from pretrain.deduplication import NearDuplicateKeys, SeenKeys, hash_ngrams, hash_text

NONE = np.empty(0, np.uint64)


def check(text, overlap=NONE, **settings):
    found = Cleaner(CleaningArguments(**settings), overlap).check(text)
    return found and found[0]


def test_lengths_are_characters_and_their_ends_stay():
    assert check("小河流过", min_characters=4) is None
    assert check("小河流", min_characters=4) == "too short"
    assert check("小河流过", max_characters=4) is None
    assert check("小河流过。", max_characters=4) == "too long"


def test_symbols_are_what_is_no_letter_digit_or_space():
    assert check("ab 12_#", max_symbol_share=0.14) == "too many symbols"  # 1 of 7
    assert check("ab 12_#", max_symbol_share=0.15) is None
    assert check("你好，世界！", max_symbol_share=0.3) == "too many symbols"  # 2 of 6
    assert check("你好，世界！", max_symbol_share=0.34) is None


def test_languages():
    cleaner = Cleaner(CleaningArguments(languages=["en", "zh"]), NONE)
    texts = {
        "en": "The river runs past the old mill, and the people of the village know it well.",
        "zh": "小河流过磨坊，村里的人都喜欢在那里散步，孩子们在水边玩耍。",
        "ru": "Река течёт мимо старой мельницы, и все в деревне её хорошо знают.",
    }
    for code, text in texts.items():
        assert cleaner.detect_language(text) == code
        assert (cleaner.check(text, code) is None) == (code != "ru")
    assert cleaner.check(texts["ru"], "ru") == ("another language", "ru")
    assert cleaner.detect_language("老磨坊嘅水車壞咗，冇人識整。") == "zh"  # py3langid: yue
    assert Cleaner(CleaningArguments(), NONE).detect_language(texts["ru"]) is None


def test_thirteen_words_in_a_row_are_an_overlap_twelve_are_not(tmp_path):
    words = "a miller carries three hundred and forty stones over the bridge in one summer".split()
    rows = [{"messages": [{"role": "user", "content": " ".join(words)}]}, {"question": "Why?"},
            {"prompt": "小明有十二个苹果，给了小红五个，还剩几个？"}]  # fmt: skip
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    overlap, counts = hash_evaluation([str(path)])
    assert counts == {"rows": 3, "too short to find": 1}
    assert len(overlap) == len(words) - 12 + 18 - 12
    for text, found in [
        ("It says: " + " ".join(words[:13]), True),
        ("A MILLER carries: three-hundred and forty stones over the bridge, in ONE summer!", True),
        (" ".join(words[1:13]) + " winter", False),
        (" ".join(words[:6] + ["old"] + words[6:]), False),
        ("题目：小明有十二个苹果，给了小红五个。", True),
        ("题目：小明有十三个苹果，给了小红五个。", False),
    ]:
        assert (check(text, overlap) == "overlaps the evaluation files") == found, text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exact_duplicates": "yes"}, "exact_duplicates='yes'; choose keep or remove"),
        ({"near_duplicates": 1.0}, "near_duplicates=1.0 must lie between 0 and 1"),
        ({"max_symbol_share": 0.0}, r"max_symbol_share=0.0 must lie in \(0, 1\]"),
        ({"min_characters": 9, "max_characters": 9}, "max_characters=9 must be above"),
        ({"languages": ["en", "english"]}, "languages: 'english' is none of .* zh"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_cleaning(CleaningArguments(**settings))


def test_ngrams_know_case_and_white_space_apart_and_order_alike():
    one, other = hash_ngrams("The river\nruns past", 2), hash_ngrams("the RIVER runs, past!", 2)
    assert one.tolist() == other.tolist() and len(set(one.tolist())) == 3
    assert hash_ngrams("river the runs past", 2)[0] not in one
    assert len(hash_ngrams("小河流过", 2)) == 3 and len(hash_ngrams("小", 2)) == 0
    assert hash_text(" a\n") == hash_text("a") != hash_text("A")


def make_pair(rng, length, shared):
    """Two texts of `length` words whose runs of five words have about this share in common."""
    words = [f"w{number}" for number in rng.integers(0, 100_000, length)]
    # A new word breaks five runs: with k of them 1 - 5k/n of n runs stay, s = (n-5k) / (n+5k).
    changes = round(length * (1 - shared) / (1 + shared) / 5)
    other = list(words)
    for place in np.linspace(10, length - 10, changes).astype(int):
        other[place] = "changed"
    return " ".join(words), " ".join(other)


@pytest.mark.parametrize(("shared", "found"), [(0.95, 0.998), (0.8, 0.399), (0.5, 0.001)])
def test_near_duplicates_are_found_as_often_as_the_curve_says(shared, found):
    keys, rng = NearDuplicateKeys(0.8), np.random.default_rng(0)
    assert (keys.bands, keys.rows) == (9, 13)
    pairs = [make_pair(rng, 400, shared) for _ in range(60)]
    met = np.mean([bool(set(keys(a).tolist()) & set(keys(b).tolist())) for a, b in pairs])
    assert abs(met - found) < 0.2 * found + 0.02, met
    assert 1 - (1 - shared**keys.rows) ** keys.bands == pytest.approx(found, abs=1e-3)


def test_near_duplicate_keys_of_short_and_of_long_texts(monkeypatch):
    keys = NearDuplicateKeys(0.8)
    assert set(keys("Hm. Yes.")) == set(keys("hm. yes."))
    assert not set(keys("Hm. Yes.")) & set(keys("Hm. No."))
    text = " ".join(map(str, range(3000)))
    whole = keys(text)
    monkeypatch.setattr("pretrain.deduplication.AT_ONCE", 100)
    assert keys(text).tolist() == whole.tolist()


def test_seen_keys_are_a_set_in_eight_bytes_a_key():
    rng, seen, expected = np.random.default_rng(0), SeenKeys(), set()
    for _ in range(200):
        keys = rng.integers(0, 50_000, (50, 3)).astype(np.uint64) * np.uint64(1 << 45)
        new = seen.find_new(keys)
        for row, is_new in zip(keys.tolist(), new, strict=True):
            assert is_new == (not expected & set(row))
            if is_new:
                expected |= set(row)
        seen.add(np.unique(keys[new]))
        assert not seen.find_new(keys[new]).any()
    assert len(seen) == len(expected)
    assert len(seen._runs) < 15
    assert sum(run.nbytes for run in seen._runs) == 8 * len(expected)
