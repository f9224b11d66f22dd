"""The verifiers on the answers that a careless one gets wrong."""

import builtins
import re
import signal
import time

import pytest

from sft.verifiers import (
    VERIFIERS,
    check_answer,
    is_number,
    limited_time,
    parse_formula,
    verify,
)

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
    # math: the marked expression, by value
    ("math", r"So \boxed{\frac{1}{2}}.", "0.5", True),
    ("math", r"\boxed{0.5}", r"\frac{1}{2}", True),
    ("math", r"\boxed{\dfrac{3}{4}}", r"$\frac{6}{8}$", True),
    ("math", "#### 1,234", "1234", True),
    ("math", r"\boxed{1{,}234}", "1234", True),
    ("math", "She pays $18", "18", True),
    ("math", "$5 for one and $10 for two: $15", "15", True),
    ("math", "$5 for one and $10 for two: $15", "5", False),
    ("math", r"first $\frac{1}{3}$, then $\frac{1}{2}$", "1/3", False),
    ("math", r"$\frac{1}{3}$ in 7 steps", "1/3", True),
    ("math", r"\boxed{\sqrt{8}}", r"2\sqrt{2}", True),
    ("math", r"\boxed{2\sqrt{2}}", r"2\sqrt{3}", False),
    ("math", r"\boxed{(x+1)^2}", "x^2+2x+1", True),
    ("math", r"\boxed{x^2+1}", "x^2+2x+1", False),
    ("math", r"\boxed{x = 4}", "4", True),
    ("math", r"\boxed{\frac{\pi}{2}}", r"\pi/2", True),
    ("math", r"\boxed{\{3, 1, 2\}}", r"\{1, 2, 3\}", True),
    ("math", r"\boxed{(1, 2)}", "(2, 1)", False),
    ("math", r"\boxed{[0, 1)}", "[0, 1)", True),
    ("math", r"\boxed{[0, 1]}", "[0, 1)", False),
    ("math", r"\boxed{1} and then \boxed{2}", "1", False),
    ("math", r"\boxed{\frac{1}{2", "0.5", False),
    ("math", r"\boxed{}", "0.5", False),
    ("math", "The answer is x", "x^2", False),
    ("math", r"\boxed{9^{9^{9^{9}}}}", r"\sqrt{2}", False),
    ("math", r"\boxed{99999!}", r"\sqrt{2}", False),
    ("math", r"\boxed{" + "9+" * 4000 + "9}", r"\sqrt{2}", False),
    ("math", r"\boxed{__import__('os').system('exit 1')}", "0", False),
    # choice: the letter
    ("choice", "B", "B", True),
    ("choice", "(B)", "B", True),
    ("choice", "B. Paris", "B", True),
    ("choice", "**B**", "B", True),
    ("choice", "b", "B", False),
    ("choice", "The answer is (C).", "C", True),
    ("choice", "The correct option is: D", "D", True),
    ("choice", "A is wrong, so the answer is B.", "B", True),
    ("choice", "Answer: A. Not answer: B", "A", False),
    ("choice", r"\boxed{\text{C}}", "C", True),
    ("choice", "I choose #### D", "D", True),
    ("choice", "A dog runs", "A", False),
    ("choice", "A good answer is B", "B", True),
    ("choice", "It must be B.", "B", True),
    ("choice", "A or B", "A", False),
    ("choice", "The answer is A or B", "A", False),
    ("choice", "B, C", "C", False),
    ("choice", "答案是B。", "B", True),
    ("choice", "选Ｃ", "C", True),
    ("choice", "答案：（D）", "D", True),
    ("choice", "A和B都对", "A", False),
    ("choice", "C是对的", "C", True),
    ("choice", "Bob", "B", False),
    ("choice", "BC", "B", False),
    ("choice", "A B C D", "A", False),
    ("choice", "", "A", False),
    # json: the same value
    ("json", '{"a": 1, "b": [true, null]}', '{"b": [true, null], "a": 1.0}', True),
    ("json", '```json\n{"a": 1}\n```', '{"a": 1}', True),
    ("json", 'Here:\n```\n{"a": 1}\n```\nDone.', '{"a": 1}', True),
    ("json", 'Here it is: {"a": 1}', '{"a": 1}', False),
    ("json", '{"a": 1} {"a": 1}', '{"a": 1}', False),
    ("json", "{'a': 1}", '{"a": 1}', False),
    ("json", '{"a": 1,}', '{"a": 1}', False),
    ("json", '{"a": 2, "a": 1}', '{"a": 1}', False),
    ("json", '{"a": true}', '{"a": 1}', False),
    ("json", '{"a": "1"}', '{"a": 1}', False),
    ("json", '{"a": 1, "b": 2}', '{"a": 1}', False),
    ("json", "[2, 1]", "[1, 2]", False),
    ("json", "[1, 2]", "[1, 2]", True),
    ("json", "NaN", "0", False),
    ("json", "[" * 100_000, "[]", False),
    ("json", "9" * 5000, "9", False),
    ("json", "null", "0", False),
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
    with pytest.raises(ValueError, match=r"'numbr'.*choice.*contains.*exact.*json.*math.*number"):
        verify("7", "7", "numbr")


@pytest.mark.parametrize(
    ("verifier", "answer", "message"),
    [
        ("number", "seven", "no number"),
        ("yes_no", "maybe", "no yes or no"),
        ("sequence", "7", "no sequence"),
        ("contains", "Paris|", "empty alias"),
        ("math", "", "no expression"),
        ("choice", "Z", "no choice"),
        ("json", "{a: 1}", "no JSON"),
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


def test_of_what_a_model_wrote_only_digits_are_evaluated(monkeypatch):
    """sympy reads a number token of the LaTeX grammar by evaluating "Integer (12 )": no more."""
    verify(r"\boxed{\sqrt{8}x}", r"2\sqrt{2}", "math")  # what is imported evaluates, too
    sources, evaluate = [], builtins.eval

    def record(code, *args):
        sources.append(code)
        return evaluate(code, *args)

    monkeypatch.setattr("sympy.parsing.sympy_parser.eval", record, raising=False)
    parse_formula.cache_clear()
    for text in (
        "__import__('os').abort()", r"\text{abort()}", "abort()", "x.__class__", "1+1", "f(x)",
        r"\mathrm{os.abort}(1)", "'abort'", r"\{abort, 1\}", r"lambda: 0", r"\sqrt{abort}", "1.5e9",
    ):  # fmt: skip
        verify(rf"\boxed{{{text}}}", r"2\sqrt{2}", "math")
    assert sources and all(
        re.fullmatch(r"(Integer|Float|Rational) \('?[0-9., ]+'? *\)", source) for source in sources
    ), sources


def test_a_formula_that_takes_long_is_wrong_and_not_waited_for():
    nested = r"\boxed{((((9^{999})^{999})^{999})^{999})^{999}}"
    began = time.process_time()
    assert verify(nested, r"\sqrt{2}", "math") is False
    assert time.process_time() - began < 60  # the limit is 5 s of computing; without it, hours


def test_a_time_limit_is_of_computing_and_ends():
    with limited_time(0.05):
        while True:
            pass
    time.sleep(0.01)
    with limited_time(0.5):
        time.sleep(0.6)  # waiting is no computing
        finished = True
    assert finished and signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


def test_is_number():
    assert all(map(is_number, ["7", "-3", "1,000", "$5", "50%", "3/4", "７"]))
    assert not any(map(is_number, ["7 apples", "100-200", "", "1/0", "x7"]))
