"""What each reward function pays for, on the answers that a careless one pays wrongly."""

import pytest

from rlhf.reward_functions import REWARD_FUNCTIONS, REWARD_NAMES, make_reward_functions
from sft.eval import repetition

TEXTS = [
    # name, completion, reward
    ("answer_format", "6 + 1 = 7\n#### 7", 1.0),
    ("answer_format", r"So \boxed{7}.", 1.0),
    ("answer_format", r"\boxed{\frac{1}{2}}", 1.0),
    ("answer_format", "7", 0.0),
    ("answer_format", "####", 0.0),
    ("answer_format", r"\boxed{}", 0.0),
    ("answer_format", r"\boxed{7", 0.0),
    ("answer_format", "#### 7\n#### 8", 0.0),
    ("answer_format", r"\boxed{7} #### 7", 0.0),
    ("json_format", '{"a": [1, 2]}', 1.0),
    ("json_format", "```json\n[]\n```", 1.0),
    ("json_format", "7", 1.0),
    ("json_format", "Sure: {}", 0.0),
    ("json_format", "{'a': 1}", 0.0),
    ("json_format", '{"a": 1', 0.0),
    ("json_format", "", 0.0),
    ("think_format", "<think>\n6 + 1\n</think>\n7", 1.0),
    ("think_format", "<think>6 + 1\n7", 0.0),
    ("think_format", "7 <think>6 + 1</think>", 0.0),
    ("think_format", "<think>a<think>b</think>", 0.0),
]
IDS = [
    # name, token ids, reward; with max_completion_length 10 the last 2 tokens cost
    ("repetition_penalty", [1, 2, 3, 4], 0.0),
    ("repetition_penalty", [5, 5], 0.0),
    ("repetition_penalty", [5, 5, 5, 5, 5], -2 / 3),
    ("repetition_penalty", [1, 2, 3, 1, 2, 3], -1 / 4),
    ("overlong_penalty", [1] * 8, 0.0),
    ("overlong_penalty", [1] * 9, -0.5),
    ("overlong_penalty", [1] * 10, -1.0),
]


@pytest.mark.parametrize(("name", "text", "reward"), TEXTS)
def test_rewards_of_texts(name, text, reward):
    (function,) = make_reward_functions([name], 10)
    assert function(completions=[[{"role": "assistant", "content": text}]] * 2) == [reward] * 2


@pytest.mark.parametrize(("name", "ids", "reward"), IDS)
def test_rewards_of_token_ids(name, ids, reward):
    (function,) = make_reward_functions([name], 10)
    assert function(completion_ids=[ids]) == pytest.approx([reward])


def test_the_repetition_penalty_is_the_guard():
    for ids in ([], [1], [5] * 7, [1, 2, 3, 1, 2, 3, 9], list(range(20)) * 2):
        (penalty,) = REWARD_FUNCTIONS["repetition_penalty"](completion_ids=[ids])
        assert penalty == pytest.approx(-repetition(ids))


def test_names_are_functions_or_directories():
    made = make_reward_functions(["verifier", "output/tiny/reward"], 10)
    assert made == [REWARD_FUNCTIONS["verifier"], "output/tiny/reward"]
    with pytest.raises(ValueError, match="'verifyer' is no reward function.*overlong_penalty"):
        make_reward_functions(["verifyer"], 10)
    with pytest.raises(ValueError, match="names 'verifier' twice"):
        make_reward_functions(["verifier", "verifier"], 10)
    tested = {case[0] for case in TEXTS + IDS} | {"verifier"}
    assert tested == REWARD_NAMES
