"""Which tasks GRPO trains on, and that reward and metric are one function."""

import pytest

from rlhf.reward_functions import verifiable_reward
from rlhf.train_grpo import choose_tasks
from sft.data import DataSummary
from sft.verifiers import verify

TASKS = [{"kind": k, "level": n} for k, n in [("sum", 1), ("sum", 3), ("logic", 1), ("logic", 2)]]


def test_tasks_are_chosen_by_kind_and_level_and_the_rest_is_counted():
    summary = DataSummary()
    assert choose_tasks(TASKS, ["logic"], 1, summary) == [TASKS[2]]
    dropped = {reason: len(sources) for reason, sources in summary.dropped.items()}
    assert dropped == {"kind not in ['logic']": 2, "level above max_level=1": 1}
    assert choose_tasks(TASKS, [], None, DataSummary()) == TASKS


def test_unknown_kind_names_the_known_ones():
    with pytest.raises(ValueError, match=r"kind \['logik'\]; there are \['logic', 'sum'\]"):
        choose_tasks(TASKS, ["logik"], None, DataSummary())


def test_reward_is_the_metric():
    answers = ["48", "It is 47.", "no", "是的"]
    right, names = ["48", "48", "yes", "是"], ["number", "number", "yes_no", "yes_no"]
    rewards = verifiable_reward(answers, answer=right, verifier=names)
    assert rewards == [1.0, 0.0, 0.0, 1.0]
    assert rewards == [float(verify(*row)) for row in zip(answers, right, names, strict=True)]
    chat = [[{"role": "assistant", "content": answer}] for answer in answers]
    assert verifiable_reward(chat, answer=right, verifier=names) == rewards
