"""Which documents are left out of the training text, and why.

Each step is off by default and says what it removed, with examples: a filter nobody looks at
removes the wrong documents sooner or later.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pretrain.deduplication import WORD, NearDuplicateKeys, hash_ngrams

OVERLAP = 13  # words in a row that no two authors write alike (Brown et al. 2020, appendix C)
LANGUAGE_CHARACTERS = 1_000  # of a document's beginning, by which its language is told
CHINESE = ("yue", "wuu")  # what a line of written Chinese is often taken for
EXACT_DUPLICATE, NEAR_DUPLICATE = "exact duplicate", "near duplicate"

_ORDINARY = re.compile(r"[\w\s]+")


@dataclass(kw_only=True)
class CleaningArguments:
    """The steps, in the order in which they run, but for near duplicates, which come last."""

    exact_duplicates: str = field(
        default="keep", metadata={"help": "keep, or remove texts that were there before"}
    )
    near_duplicates: float | None = field(
        default=None,
        metadata={"help": "remove texts that share this much with an earlier one, e.g. 0.8"},
    )
    min_characters: int = field(default=0, metadata={"help": "shorter documents are removed"})
    max_characters: int | None = field(
        default=None, metadata={"help": "longer documents are removed"}
    )
    max_symbol_share: float = field(
        default=1.0, metadata={"help": "of characters that are no letter, digit or space, e.g. 0.3"}
    )
    languages: list[str] = field(
        default_factory=list,
        metadata={"help": "codes such as en zh; documents in others are removed (py3langid)"},
    )
    evaluation_files: list[str] = field(
        default_factory=list,
        metadata={"help": "training text with 13 words in a row of theirs is removed"},
    )


def check_cleaning(args: CleaningArguments) -> None:
    """Raise ValueError for settings that say nothing."""
    if args.exact_duplicates not in ("keep", "remove"):
        raise ValueError(f"exact_duplicates={args.exact_duplicates!r}; choose keep or remove")
    if args.near_duplicates is not None:
        NearDuplicateKeys(args.near_duplicates)
    if not 0 < args.max_symbol_share <= 1:
        raise ValueError(f"max_symbol_share={args.max_symbol_share} must lie in (0, 1], e.g. 0.3")
    if args.max_characters is not None and args.max_characters <= args.min_characters:
        raise ValueError(
            f"max_characters={args.max_characters} must be above "
            f"min_characters={args.min_characters}"
        )
    if args.languages:
        import py3langid

        known = sorted(code for code, _ in py3langid.rank("text"))
        known = [code for code in known if code not in CHINESE]
        wrong = [code for code in args.languages if code not in known]
        if wrong:
            raise ValueError(f"languages: {wrong[0]!r} is none of {' '.join(known)}")


class Cleaner:
    """The steps that look at one document alone."""

    def __init__(self, args: CleaningArguments, overlap: np.ndarray):
        """`overlap` are the hashes that `hash_evaluation` gives."""
        self._args, self._overlap = args, overlap
        self.bands = 0  # keys a document
        if args.near_duplicates is not None:
            self.near_keys = NearDuplicateKeys(args.near_duplicates)
            self.bands = self.near_keys.bands

    def check(self, text: str, language: str | None = None) -> tuple[str, str] | None:
        """The step that removes a document and what it saw; None where it stays."""
        args, length = self._args, len(text)
        if length < args.min_characters:
            return "too short", f"{length} characters"
        if args.max_characters is not None and length > args.max_characters:
            return "too long", f"{length} characters"
        if args.max_symbol_share < 1:
            share = len(_ORDINARY.sub("", text)) / length
            if share > args.max_symbol_share:
                return "too many symbols", f"{share:.2f} of the characters"
        if language is not None and language not in args.languages:
            return "another language", language
        if len(self._overlap) and (found := self._find_overlap(text)):
            return "overlaps the evaluation files", found
        return None

    def detect_language(self, text: str) -> str | None:
        """The code of a document's language, None where `languages` asks for none."""
        if not self._args.languages:
            return None
        import py3langid

        code = py3langid.classify(text[:LANGUAGE_CHARACTERS])[0]
        return "zh" if code in CHINESE else code

    def _find_overlap(self, text: str) -> str:
        ngrams = hash_ngrams(text, OVERLAP)
        places = np.minimum(np.searchsorted(self._overlap, ngrams), len(self._overlap) - 1)
        (found,) = np.nonzero(self._overlap[places] == ngrams)
        if not len(found):
            return ""
        words = WORD.findall(text.casefold())[found[0] : found[0] + OVERLAP]
        return " ".join(words)


def hash_evaluation(data_files: list[str]) -> tuple[np.ndarray, dict[str, int]]:
    """Sorted hashes (N,) of the 13 words in a row that stand in evaluation files, and counts.

    Every text of every row counts, whatever its field: questions, answers, messages. `counts` has
    the "rows", and those "too short to find", which by fewer words would be met by chance.
    """
    from tokenizer.corpus import read_rows

    hashes, counts = [np.empty(0, np.uint64)], {"rows": 0, "too short to find": 0}
    for row in read_rows(data_files) if data_files else ():
        found = [hash_ngrams(text, OVERLAP) for text in find_texts(row.value)]
        counts["rows"] += 1
        counts["too short to find"] += not any(map(len, found))
        hashes += found
    return np.unique(np.concatenate(hashes)), counts


def find_texts(value: Any) -> Iterator[str]:
    """Every text in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from find_texts(part)
