"""Decide whether a completion gives the right answer, by plain rules that can be read.

The reward of GRPO and PPO and the accuracy of the evaluation are both this one function.
"""

import json
import logging
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from typing import Any

# Full-width forms (U+FF01 to U+FF5E) stand for ASCII. NFKC would do more harm than good: it turns
# 5² into 52.
TO_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
TO_ASCII |= {0x2212: "-", 0x2013: "-", 0x3000: " "}

UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
# A minus after a digit, a letter or a bracket subtracts or joins: "10-3", "covid-19".
SIGN = r"(?:(?<![A-Za-z0-9_)\]}])-\$?(?=[0-9.])|负\s?|negative )"
NUMBER = re.compile(
    rf"(?P<sign>{SIGN})?(?<![A-Za-z_0-9])(?P<top>{UNSIGNED})(?:\s?/\s?(?P<bottom>{UNSIGNED}))?",
    re.IGNORECASE,
)

# A question that is repeated ("7是不是奇数？") decides nothing and is passed over.
ECHO = re.compile("是不是|对不对|有没有|能不能|会不会|可不可以|是否|能否|可否|会否")
HEDGE = r"yes\s*(?:/|or|and)\s*no|是\s*(?:/|或者?|还是)\s*(?:否|不是)"
NO = (
    r"(?<![A-Za-z])(?:no|nope|not|cannot|[a-z]+n['’]t)(?![A-Za-z])"
    r"|不(?:是|对|能|会|可以|正确|行|存在|成立)|没有|错误|否(?!则)"
    r"|(?:^|(?<=[\s,.:;!?，。：；！？、“\"(（]))(?:不|没|错)(?![仅但过同错管])"
)
YES = (
    r"(?<![A-Za-z])(?:yes|yep|yeah)(?![A-Za-z])|(?:是|对|正确)的|正确"
    # Inside a sentence these words are a copula or a preposition ("这是", "对于"), so they count
    # only where a clause begins.
    r"|(?:^|(?<=[\s,.:;!?，。：；！？、“\"(（]))(?:是|对(?![于面着方应])|有|能|会|可以)"
)
VERDICT = re.compile(f"(?P<hedge>{HEDGE})|(?P<no>{NO})|(?P<yes>{YES})", re.IGNORECASE)

# pandoc's rule for formulas in $: "$5 and $10" is money.
FORMULA = re.compile(
    r"\$\$?(?!\s)([^$]+?)(?<!\s)\$\$?(?![0-9])|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
LONGEST_FORMULA = 200
# Powers of powers and large factorials have more digits than the machine has memory.
TOO_LARGE = re.compile(
    r"\^\s*\{[^{}]*[\^!]|\^\s*\w\s*\^|\^[\s{(]*-?[0-9]{4}|[0-9]{4}\s*\)?!|!\s*\)*!"
)

LETTER = r"(?<![A-Za-z0-9])\(?([A-J])\)?(?![A-Za-z0-9'])"
CHOICES = [  # the first pattern that is found decides, by its last match
    rf"(?:####\s*|\\boxed\{{\s*(?:\\text\s*\{{)?\s*){LETTER}",
    rf"(?:(?i:answer|choice|option)|答案|选项|选择?)[\s*:：]*(?:(?i:is)|是|为|应该?[选是为])?[\s*:：]*{LETTER}",
    rf"^[\s*]*{LETTER}(?=[\s*]*(?:[.:,;、。：]|$|\n))|{LETTER}\s*(?:is|是)\s*(?:right|correct|the|对|正确)",
]
ALONE = re.compile(rf"{LETTER}(?![ ]+[a-z])")  # "A dog" begins with an article
OTHER_LETTER = re.compile(r"\s*(?:/|,|、|or|and|或者?|和|与|还是)\s*\(?[A-J](?![A-Za-z])")

ITEM = r"-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
COMMA = r"\s*[,，、]\s*(?:and\s+|和\s*)?"
SEQUENCE = re.compile(rf"(?<![A-Za-z0-9_.]){ITEM}(?:{COMMA}{ITEM})+")


def verify(completion: str, answer: str, verifier: str) -> bool:
    """Tell whether `completion` gives `answer`.

    Args:
        completion: what the model said.
        answer: the right answer, in the form that the verifier expects.
        verifier: "number": the number after "####", else in the last \\boxed{}, else the last one
            of the text equals the answer (1,000 = 1000.0; 3/4 = 0.75; a % sign is not read).
            "yes_no": the first yes or no word, English or Chinese; "yes or no" decides nothing.
            "math": the expression behind the last "####", in the last \\boxed{} or in the last
            $...$ equals the answer (math-verify); without such a mark, the last number does.
            "choice": the letter A to J that is marked, called the answer, put in front, or the only
            one; "A or B" decides nothing.
            "json": the text, or its one ``` block, is JSON and equals the answer, key by key;
            1 = 1.0, the order of keys does not matter.
            "sequence": the last run of numbers with commas between equals the answer, in order.
            "exact": equal but for outer white space and one final full stop.
            "contains": the answer, or one of several separated by "|", occurs; case does not
            matter, and Latin words and digits must stand alone. It does not understand "not".

    Raises:
        ValueError: unknown verifier, or an answer that this verifier can never accept.
    """
    if verifier not in VERIFIERS:
        raise ValueError(f"verifier={verifier!r} is unknown; choose one of {sorted(VERIFIERS)}")
    return VERIFIERS[verifier](completion, answer)


def check_answer(answer: str, verifier: str) -> None:
    """Raise ValueError where the right answer itself would not pass its verifier."""
    if not verify(answer, answer, verifier):
        raise ValueError(f"answer {answer!r} does not pass its own verifier {verifier!r}")


def verify_number(completion: str, answer: str) -> bool:
    """The last number of the completion equals the answer, as a value: 1,000 is 1000."""
    expected = find_number(answer)
    if expected is None:
        raise ValueError(f"answer {answer!r} has no number; use another verifier")
    return find_number(completion) == expected


def find_number(text: str) -> Fraction | None:
    """Return the number that the text ends on (or marks by "####" or \\boxed{}), or None."""
    text = text.translate(TO_ASCII)
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text)
    if "####" in text:
        marked = text.rsplit("####", 1)[1]
        return parse_number(NUMBER.search(marked))
    if boxed := re.findall(r"\\boxed\{([^{}]*)\}", text):
        text = boxed[-1]
    numbers = list(NUMBER.finditer(text))
    return parse_number(numbers[-1] if numbers else None)


def is_number(text: str) -> bool:
    """Tell whether the text is one number and nothing else, but for a sign of money or per cent."""
    text = text.translate(TO_ASCII).strip().lstrip("$").rstrip("%")
    return parse_number(NUMBER.fullmatch(text)) is not None


def parse_number(match: re.Match | None) -> Fraction | None:
    """The value of a match, or None."""
    # A policy that babbles writes thousands of digits; Python refuses to parse beyond 4,300.
    if match is None or len(match.group()) > 1000:
        return None
    value = Fraction(match["top"].replace(",", ""))
    if match["bottom"]:
        bottom = Fraction(match["bottom"].replace(",", ""))
        if not bottom:
            return None
        value /= bottom
    return -value if match["sign"] else value


def verify_math(completion: str, answer: str) -> bool:
    """The marked expression equals the answer: 1/2 is 0.5 and \\frac{\\sqrt{4}}{4}."""
    answer = find_expression(answer) or answer
    expected = parse_number(NUMBER.fullmatch(plain_number(answer)))
    if expected is None and not parse_formula(answer):
        raise ValueError(f"answer {answer!r} is no expression; write LaTeX, as in \\frac{{1}}{{2}}")
    found = find_expression(completion)
    if found is None:
        return expected is not None and find_number(completion) == expected
    value = parse_number(NUMBER.fullmatch(plain_number(found)))
    if None not in (value, expected):
        return value == expected
    return same_formula(parse_formula(answer), parse_formula(found))


def find_expression(text: str) -> str | None:
    """Return what is marked by "####", \\boxed{} or, last of all, $...$; None without a mark."""
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().partition("\n")[0].strip(" $.。")
    if (start := text.rfind("\\boxed{")) >= 0:
        depth, start = 1, start + len("\\boxed{")
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if not depth:
                return text[start:end].strip()
        return ""  # cut off: nothing that could be right
    formulas = FORMULA.findall(text)
    return next(filter(None, formulas[-1])).strip() if formulas else None


def plain_number(text: str) -> str:
    """A formula in the form that `NUMBER` reads: without \\frac, thin spaces, $ and %."""
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text.translate(TO_ASCII))
    return text.replace("{,}", ",").replace("\\!", "").strip().strip("$").rstrip("\\% ")


@lru_cache(maxsize=4096)
def parse_formula(text: str) -> tuple:
    """What math-verify makes of LaTeX; nothing where it cannot read it, or should not try.

    Only its LaTeX grammar reads the text. Its reader of plain expressions is sympy's `parse_expr`,
    which evaluates Python, and is given no more of what a model wrote than a token of digits.
    """
    if not text or len(text) > LONGEST_FORMULA or TOO_LARGE.search(text):
        return ()
    from math_verify import LatexExtractionConfig, parse

    with limited_time():
        config = [LatexExtractionConfig()]
        return tuple(parse(f"\\boxed{{{text}}}", config, "no_fallback", parsing_timeout=None))
    return ()


def same_formula(expected: tuple, found: tuple) -> bool:
    """Whether two parsed formulas are equal, in the order of math-verify: the right one first."""
    if not expected or not found:
        return False
    from math_verify import verify as equal

    with limited_time():
        return equal(list(expected), list(found), timeout_seconds=None)
    return False


@contextmanager
def limited_time(seconds: float = 5.0) -> Iterator[None]:
    """Leave the block after so many seconds of this process's own computing.

    math-verify has a limit too, but of time on the clock: on a busy machine right answers would
    be wrong. Only the main thread can set a limit, and only where there is such a signal.
    """
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # warns that its limit is off
    in_main = threading.current_thread() is threading.main_thread()
    if not (in_main and hasattr(signal, "ITIMER_VIRTUAL")):
        yield
        return

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.5)  # again: it may be caught further in
    try:
        yield
    except TimeoutError:
        pass
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def verify_choice(completion: str, answer: str) -> bool:
    """The letter of the completion is the answer's."""
    expected = find_choice(answer)
    if expected is None:
        raise ValueError(f"answer {answer!r} is no choice; write one letter from A to J")
    return find_choice(completion) == expected


def find_choice(text: str) -> str | None:
    """Return the letter that a text chooses; None where it chooses none or several."""
    text = text.translate(TO_ASCII)
    for pattern in CHOICES:
        if matches := list(re.finditer(pattern, text)):
            hedges = OTHER_LETTER.match(text, matches[-1].end())
            return None if hedges else next(filter(None, matches[-1].groups()))
    letters = set(ALONE.findall(text))
    return letters.pop() if len(letters) == 1 else None


def verify_json(completion: str, answer: str) -> bool:
    """The completion is the JSON value of the answer."""
    expected = find_json(answer)
    if not expected:
        raise ValueError(f"answer {answer!r} is no JSON")
    found = find_json(completion)
    return bool(found) and same_json(expected[0], found[0])


def find_json(text: str) -> list:
    """Return [value] of a text that is JSON, alone or in its only ``` block; [] of any other.

    What JSON does not have (NaN, a key twice) is not accepted.
    """
    blocks = re.findall(r"```(?:json)?\s*\n(.*?)```", text, re.DOTALL)
    try:
        value = json.loads(
            blocks[0] if len(blocks) == 1 else text,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique_keys,
        )
    except (ValueError, RecursionError):  # digits and depth beyond what Python reads, too
        return []
    return [value]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)


def same_json(a: Any, b: Any) -> bool:
    """Equal values; true is not 1, as it is in Python."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def verify_yes_no(completion: str, answer: str) -> bool:
    """The first yes or no of the completion, English or Chinese, is the answer."""
    expected = find_verdict(answer)
    if expected is None:
        raise ValueError(f"answer {answer!r} is no yes or no; write 'yes', 'no', '是' or '否'")
    return find_verdict(completion) is expected


def find_verdict(text: str) -> bool | None:
    """Return the first yes (True) or no (False) of the text; None where there is none."""
    text = re.sub(r"答案\s*[是为]?\s*[:：]?\s*", "", text.translate(TO_ASCII))
    match = VERDICT.search(ECHO.sub("", text))
    return None if match is None or match["hedge"] else match["yes"] is not None


def verify_sequence(completion: str, answer: str) -> bool:
    """The last run of numbers equals the answer, in the same order."""
    expected = find_sequence(answer)
    if expected is None:
        raise ValueError(f"answer {answer!r} is no sequence; write '1, 2, 3'")
    return find_sequence(completion) == expected


def find_sequence(text: str) -> list[Fraction] | None:
    """Return the numbers of the last run such as "1, 2, 3" (two or more), or None."""
    runs = SEQUENCE.findall(text.translate(TO_ASCII))
    if not runs or len(runs[-1]) > 1000:
        return None
    return [Fraction(item) for item in re.split(COMMA, runs[-1])]


def verify_exact(completion: str, answer: str) -> bool:
    """Equal, but for white space and a final full stop."""
    return strip_stop(completion) == strip_stop(answer)


def strip_stop(text: str) -> str:
    """A text without its outer white space and final full stop."""
    text = text.strip()
    return text[:-1].rstrip() if text.endswith((".", "。")) else text


def verify_contains(completion: str, answer: str) -> bool:
    """An alias of the answer (separated by "|") occurs in the completion."""
    aliases = [alias.strip() for alias in answer.split("|")]
    if not all(aliases):
        raise ValueError(f"answer {answer!r} has an empty alias, which every text contains")
    text = completion.translate(TO_ASCII).casefold()
    return any(find_alias(alias.translate(TO_ASCII).casefold(), text) for alias in aliases)


def find_alias(alias: str, text: str) -> bool:
    """Whether an alias occurs, as a word of its own where it is Latin."""
    # Chinese is written without spaces: its characters need no border and make one for Latin.
    letter = r"[^\W_\u3040-\u30ff\u3400-\u9fff]"
    before = rf"(?<!{letter})(?<![0-9][.,])" if re.match(letter, alias) else ""
    after = rf"(?!{letter})(?![.,][0-9])" if re.match(letter, alias[-1]) else ""
    return re.search(before + re.escape(alias) + after, text) is not None


VERIFIERS = {
    "choice": verify_choice,
    "contains": verify_contains,
    "exact": verify_exact,
    "json": verify_json,
    "math": verify_math,
    "number": verify_number,
    "sequence": verify_sequence,
    "yes_no": verify_yes_no,
}
