"""What the tokenizer's trainer counts: everything, and not too much of it at once."""

import random

import pytest
from tokenizers import pre_tokenizers

from tokenizer.pieces import LONGEST_RUN, Pieces


def count(texts, budget=10**9):
    pieces = Pieces(texts, budget)
    return list(pieces), pieces


def test_usual_text_passes_as_it_is():
    texts = ["The river, 12 + 30.\n\n\tdef f(x):  # 注释\n", "小河流过磨坊。", "", "naïve café _x_"]
    passed, pieces = count(texts)
    assert passed == texts
    assert pieces.documents == 4 and pieces.size == sum(len(text.encode()) for text in texts)
    assert pieces.halved == 0
    # The, river, def, f, x, 注释, 小河流过磨坊, naïve, café
    assert pieces.distinct == 9


@pytest.mark.parametrize("char", ["a", "河", "=", "_"])
def test_long_runs_are_cut_before_they_are_counted(char):
    (text,), _ = count([f"x {char * 1000} y"])
    runs = text.removeprefix("x ").removesuffix(" y").split("\n")
    assert "".join(runs) == char * 1000
    assert max(map(len, runs)) == LONGEST_RUN


def test_long_white_space_is_shortened():
    (text,), _ = count(["a" + " " * 500 + "b"])
    assert text == "a" + " " * LONGEST_RUN + "b"


def test_beyond_the_budget_new_runs_are_halved_until_they_are_known():
    first, second = "小河流过", "小河流过磨坊边的桥"
    (_, text), pieces = count([first, second], budget=len(first.encode()))
    # 9 characters: 5 + 4; of the 5 no half is known, and so on down to single characters.
    assert text.replace("\n", "") == second
    assert pieces.halved == 1 and pieces.distinct == 1
    assert all(len(piece) == 1 for piece in text.split("\n"))
    (_, text), _ = count(["小河 流过", "小河流过"], budget=12)
    assert text == "小河\n流过", "known halves are counted whole"


def test_memory_is_bounded_whatever_comes():
    rng = random.Random(0)
    clauses = ["".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(9)) for _ in range(2000)]
    _, pieces = count(["，".join(clauses[i : i + 20]) for i in range(0, 2000, 20)], budget=9000)
    assert sum(len(run.encode()) for run in pieces._known) <= 9000
    assert pieces.halved > 1500


def test_a_cut_adds_nothing_that_could_be_merged():
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    words = [word for word, _ in split("abc\ndef")]
    assert words == ["abc", "Ċ", "def"]
