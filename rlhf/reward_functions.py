"""Reward functions: what a policy is paid for. Evaluation measures with the same functions.

TRL calls each with the answers and the columns of the data set, and adds the results up.
"""

from sft.verifiers import verify


def verifiable_reward(
    completions: list, answer: list[str], verifier: list[str], **columns
) -> list[float]:
    """1.0 for an answer that its verifier accepts, else 0.0 (RLVR, Lambert et al. 2024).

    Args:
        completions: B answers, each a text or a list of messages.
        answer, verifier: B solutions and the names of their verifiers (`sft.verifiers`).
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    triples = zip(texts, answer, verifier, strict=True)
    return [float(verify(text, right, name)) for text, right, name in triples]


REWARD_FUNCTIONS = {"verifier": verifiable_reward}
