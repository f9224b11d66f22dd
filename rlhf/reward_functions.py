"""Reward functions: what a policy is paid for. Evaluation measures with the same functions.

TRL calls each with the answers and the columns of the data set, multiplies the results by
`reward_weights` and adds them up. Names for `reward_funcs`:

verifier            1 for a right answer, else 0 (sft.verifiers; the accuracy of every evaluation)
answer_format       1 where the answer is marked once, by "####" or \\boxed{}, else 0
json_format         1 where the text is JSON, alone or in its only ``` block, else 0
think_format        1 for "<think> ... </think> ...", else 0 (TRL's)
repetition_penalty  0 to -1: share of the token triples said before (the guard `repetition`; TRL's)
overlong_penalty    0 to -1 over the last fifth of max_completion_length (DAPO, eq. 13; TRL's)

Any other name is a reward model's directory, or its name on the Hub.
"""

from collections.abc import Callable, Sequence

from trl.rewards import (
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    think_format_reward,
)

from sft.verifiers import find_expression, find_json, verify


def verifiable_reward(
    completions: list, answer: list[str], verifier: list[str], **columns
) -> list[float]:
    """1.0 for an answer that its verifier accepts, else 0.0 (RLVR, Lambert et al. 2024).

    Args:
        completions: B answers, each a text or a list of messages.
        answer, verifier: B solutions and the names of their verifiers (`sft.verifiers`).
    """
    triples = zip(map(read_text, completions), answer, verifier, strict=True)
    return [float(verify(text, right, name)) for text, right, name in triples]


def answer_format_reward(completions: list, **columns) -> list[float]:
    """1.0 for an answer (B of them) with one mark, "####" or \\boxed{}, and something in it."""
    return [float(marks_once(read_text(completion))) for completion in completions]


def marks_once(text: str) -> bool:
    """Whether a text marks its final answer, and does so once."""
    return text.count("####") + text.count("\\boxed{") == 1 and bool(find_expression(text))


def json_format_reward(completions: list, **columns) -> list[float]:
    """1.0 for an answer (B of them) that is JSON, alone or in its only ``` block."""
    return [float(bool(find_json(read_text(completion)))) for completion in completions]


def read_text(completion: str | list[dict[str, str]]) -> str:
    """What the model said: a text, or the content of the last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def make_reward_functions(names: Sequence[str], max_completion_length: int) -> list[Callable | str]:
    """What TRL's `reward_funcs` takes: functions, and the names of reward models as they are.

    Raises:
        ValueError: a name twice, or one that is no function here and cannot be a reward model's.
    """
    made: list[Callable | str] = []
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"reward_funcs names {name!r} twice: give it a weight instead")
        if name == "overlong_penalty":
            cache = max(max_completion_length // 5, 1)
            made.append(get_soft_overlong_punishment(max_completion_length, cache))
        elif name not in REWARD_FUNCTIONS and "/" not in name:
            known = ", ".join(sorted(REWARD_NAMES))
            raise ValueError(
                f"reward_funcs: {name!r} is no reward function. Known are {known}; a reward model "
                "is named by its directory, such as output/tiny/reward"
            )
        else:
            made.append(REWARD_FUNCTIONS.get(name, name))
    return made


REWARD_FUNCTIONS = {
    "verifier": verifiable_reward,
    "answer_format": answer_format_reward,
    "json_format": json_format_reward,
    "think_format": think_format_reward,
    "repetition_penalty": get_repetition_penalty_reward(ngram_size=3),
}
REWARD_NAMES = {*REWARD_FUNCTIONS, "overlong_penalty"}
