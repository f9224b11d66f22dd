"""The verifiers on the answers that a careless one gets wrong."""

import pytest

from sft.verifiers import VERIFIERS, check_answer, is_number, verify

CASES = [
    # number: the last one of the text, as a value
    ("number", "48", "48", True),
    ("number", "148", "48", False),
    ("number", "480", "48", False),
    ("number", "48.5", "48", False),
    ("number", "The answer is 48.", "48", True),
    ("number", "48 apples, then 3 more", "48", False),
    ("number", "1,000", "1000", True),
    ("number", "1000", "1,000", True),
    ("number", "It costs 12,345,678.90 dollars", "12345678.9", True),
    ("number", "1, 2, 3", "3", True),
    ("number", "3,4", "34", False),
    ("number", "-3", "-3", True),
    ("number", "-3", "3", False),
    ("number", "3", "-3", False),
    ("number", "x=-3", "-3", True),
    ("number", "−3", "-3", True),
    ("number", "负3", "-3", True),
    ("number", "negative 3", "-3", True),
    ("number", "10-3", "3", True),
    ("number", "10-3=7", "7", True),
    ("number", "- 3 apples", "3", True),
    ("number", "-$5", "-5", True),
    ("number", "$18", "18", True),
    ("number", "７", "7", True),
    ("number", "答案是１，０００。", "1000", True),
    ("number", "共7个苹果", "7", True),
    ("number", "3/4", "0.75", True),
    ("number", "0.5", "1/2", True),
    ("number", r"\frac{3}{4}", "0.75", True),
    ("number", "1/0", "1", False),
    ("number", "So 6 + 1. #### 7 and 100 more", "7", True),
    ("number", "#### 8 7", "7", False),
    ("number", r"\boxed{7} in 3 steps", "7", True),
    ("number", r"\boxed{\frac{1}{2}}", "0.5", True),
    ("number", ".5", "0.5", True),
    ("number", "7.0", "7", True),
    ("number", "50%", "50", True),
    ("number", "5²", "52", False),
    ("number", "12 cm2", "12", True),
    ("number", "seven", "7", False),
    ("number", "", "7", False),
    ("number", "9" * 5000, "9", False),
    # yes_no: the first word that decides
    ("yes_no", "Yes.", "yes", True),
    ("yes_no", "yes", "no", False),
    ("yes_no", "not yes", "yes", False),
    ("yes_no", "yesterday", "yes", False),
    ("yes_no", "I know it", "no", False),
    ("yes_no", "Nothing", "no", False),
    ("yes_no", "No, it isn't.", "no", True),
    ("yes_no", "It isn't.", "no", True),
    ("yes_no", "NO", "no", True),
    ("yes_no", "yes or no", "yes", False),
    ("yes_no", "yes or no", "no", False),
    ("yes_no", "No. Yes would be wrong.", "yes", False),
    ("yes_no", "答案是yes", "yes", True),
    ("yes_no", "是", "yes", True),
    ("yes_no", "是的，7是奇数。", "是", True),
    ("yes_no", "不是", "是", False),
    ("yes_no", "不是", "no", True),
    ("yes_no", "否", "no", True),
    ("yes_no", "答案是否", "no", True),
    ("yes_no", "答案是：是", "yes", True),
    ("yes_no", "不对", "对", False),
    ("yes_no", "对", "yes", True),
    ("yes_no", "没有", "no", True),
    ("yes_no", "没有", "有", False),
    ("yes_no", "这不是偶数", "yes", False),
    ("yes_no", "7是不是奇数？是。", "yes", True),
    ("yes_no", "7是否为偶数？不是。", "yes", False),
    ("yes_no", "这是一个苹果", "yes", False),
    ("yes_no", "对于这个问题，不是", "no", True),
    ("yes_no", "", "no", False),
    # sequence: the last run of numbers with commas between
    ("sequence", "1, 2, 3", "1,2,3", True),
    ("sequence", "1，2、3", "1, 2, 3", True),
    ("sequence", "3, 1, 2 sorted: 1, 2, and 3.", "1, 2, 3", True),
    ("sequence", "1, 2, 3 in 2 steps", "1, 2, 3", True),
    ("sequence", "1, 2, 3, 4", "2, 3, 4", False),
    ("sequence", "1, 2", "1, 2, 3", False),
    ("sequence", "3, 2, 1", "1, 2, 3", False),
    ("sequence", "[-1, 0, 1.0]", "-1, 0, 1", True),
    ("sequence", "100,200", "100200, 1", False),
    ("sequence", "11, 2", "1, 2", False),
    ("sequence", "1 2 3", "1, 2, 3", False),
    # exact: but for outer space and one final full stop
    ("exact", " Paris.\n", "Paris", True),
    ("exact", "巴黎。", "巴黎", True),
    ("exact", "paris", "Paris", False),
    ("exact", "Paris!", "Paris", False),
    ("exact", "Paris, France", "Paris", False),
    ("exact", "Paris..", "Paris", False),
    # contains: whole words, any alias
    ("contains", "It is PARIS!", "Paris", True),
    ("contains", "The car is red", "art", False),
    ("contains", "a cat", "dog|Cat", True),
    ("contains", "a catalogue", "dog|cat", False),
    ("contains", "148", "48", False),
    ("contains", "48.5", "48", False),
    ("contains", "It is 48.", "48", True),
    ("contains", "法国的首都是巴黎", "巴黎|Paris", True),
    ("contains", "首都是Paris吗", "paris", True),
    ("contains", "Éparis", "paris", False),
    ("contains", "C++ is old", "c++", True),
    ("contains", "axb", "a.b", False),
]


@pytest.mark.parametrize(("verifier", "completion", "answer", "expected"), CASES)
def test_verify(verifier, completion, answer, expected):
    assert verify(completion, answer, verifier) is expected


def test_the_table_is_large_and_covers_every_verifier():
    assert len(CASES) >= 60
    for verifier in VERIFIERS:
        results = {case[3] for case in CASES if case[0] == verifier}
        assert results == {True, False}, verifier


def test_unknown_verifier_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'numbr'.*contains.*exact.*number.*sequence.*yes_no"):
        verify("7", "7", "numbr")


@pytest.mark.parametrize(
    ("verifier", "answer", "message"),
    [
        ("number", "seven", "no number"),
        ("yes_no", "maybe", "no yes or no"),
        ("sequence", "7", "no sequence"),
        ("contains", "Paris|", "empty alias"),
    ],
)
def test_impossible_answer(verifier, answer, message):
    with pytest.raises(ValueError, match=message):
        verify("anything", answer, verifier)


def test_check_answer_catches_what_can_never_be_right():
    check_answer("1,000", "number")
    check_answer("巴黎|Paris", "contains")
    with pytest.raises(ValueError, match="no sequence"):
        check_answer("abc", "sequence")


def test_is_number():
    assert all(map(is_number, ["7", "-3", "1,000", "$5", "50%", "3/4", "７"]))
    assert not any(map(is_number, ["7 apples", "100-200", "", "1/0", "x7"]))
