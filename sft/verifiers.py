"""Decide whether a completion gives the right answer, by plain rules that can be read.

The reward of GRPO and PPO and the accuracy of the evaluation are both this one function.
"""

import re
from fractions import Fraction

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
    "contains": verify_contains,
    "exact": verify_exact,
    "number": verify_number,
    "sequence": verify_sequence,
    "yes_no": verify_yes_no,
}
