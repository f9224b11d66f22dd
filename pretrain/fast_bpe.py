"""Byte-level BPE by tiktoken: the ids of `tokenizers`, several times as fast.

Both merge the adjacent pair of lowest rank, the leftmost first. tiktoken only knows the merged
strings, not from which halves each was learned. So it is used where this makes no difference,
which `rebuilds_its_halves` proves for a tokenizer, and where it splits texts as `tokenizers` does.
"""

import json
import re
from itertools import pairwise
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Tokenizer

from tokenizer.vocabulary import byte_of, entry_bytes

# How GPT-2 splits a text, and how this is done where digits stand one by one. ++ never tries again
# with less: the same matches, without a stack that grows with the run.
GPT2 = r"'(?:[stmd]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
DIGITS_APART = (
    r" ?\p{L}++|\p{N}|'(?:[stmd]|ll|ve|re)| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N}|$)|\s+(?!\S)|\s"
)

# What the two may split otherwise. tiktoken's regex runs out of stack between 100,000 and 1,000,000
# blanks in a row; and scripts outside the basic plane, where Unicode still adds letters, are in
# tables of another age (not emoji, nor rare Chinese characters: a test tries every code point).
APART = re.compile("\\s{10000}|[\U00010000-\U0001efff]")


class FastBPE:
    """A byte-level tokenizer whose ids tiktoken computes.

    Raises:
        ValueError: it is not proved that tiktoken gives this tokenizer's ids; the message says why.
    """

    def __init__(self, tokenizer: Tokenizer):
        state = json.loads(tokenizer.to_str())
        pattern, vocabulary = find_pattern(state), state["model"]["vocab"]
        entries = [*byte_of(), *map("".join, state["model"]["merges"])]
        strings = [entry_bytes(entry) for entry in entries]
        ranks = {string: rank for rank, string in enumerate(strings)}
        if missing := [entry for entry in entries if entry not in vocabulary]:
            raise ValueError(f"{len(missing)} bytes or merges have no entry in its vocabulary")
        halves = [(entry_bytes(a), entry_bytes(b)) for a, b in state["model"]["merges"]]
        if len(ranks) < len(strings) or not all(rebuilds_its_halves(*one, ranks) for one in halves):
            raise ValueError("its merges are not in the order in which a training makes them")
        self._tokenizer = tokenizer
        self._ids = np.array([vocabulary[entry] for entry in entries], np.uint32)
        self._by_rank = tiktoken.Encoding(
            "by rank", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> np.ndarray:
        """(tokens,) uint32: the ids of `Tokenizer.encode(text, add_special_tokens=False)`, where
        special tokens are encoded as the text that they are."""
        if APART.search(text):
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            return np.array(ids, np.uint32)
        return self._ids[self._by_rank.encode_to_numpy(text, disallowed_special=())]


def find_pattern(state: dict[str, Any]) -> str:
    """The regular expression by which a tokenizer splits texts, of the content of tokenizer.json.

    Raises:
        ValueError: it does more than to split like GPT-2, digits apart or not, and to merge bytes.
    """
    model, split = state["model"], state["pre_tokenizer"] or {}
    more = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if model["type"] != "BPE" or any(model.get(key) for key in (*more, "byte_fallback")):
        raise ValueError("its model is not plain byte-level BPE")
    if state["normalizer"] or not all(token["special"] for token in state["added_tokens"]):
        raise ValueError("it normalizes texts, or has added tokens that are not special")
    steps = split.get("pretokenizers", [split])
    *before, last = [{key: step[key] for key in step if key != "trim_offsets"} for step in steps]
    if last == {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
        if not before:
            return GPT2
        if before == [{"type": "Digits", "individual_digits": True}]:
            return DIGITS_APART
    raise ValueError("it splits texts otherwise than GPT-2")


def rebuilds_its_halves(left: bytes, right: bytes, ranks: dict[bytes, int]) -> bool:
    """Whether merging `left + right` by strings alone, as tiktoken does, ends with these halves.

    If it does so for every merge of a tokenizer, then on every text. Take the first merge that
    `tokenizers` would not make: x and y, whose string is an entry, but not of these halves. No
    merge has crossed the borders of that string, so inside it happened what happens to the string
    alone: the merges that come before its own, which end with its halves.
    """
    string = left + right
    rank, parts = ranks[string], [string[i : i + 1] for i in range(len(string))]
    while len(parts) > 1:
        found = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
        if (lowest := min(found)) == rank:
            break
        at = found.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts == [left, right]
