"""What the BPE trainer counts, in bounded memory.

The trainer keeps every distinct run of letters, at about 100 bytes of memory a byte of text.
Words between spaces repeat, so their number levels off. Text without spaces does not: nearly every
Chinese clause is a new "word", and 200 MB of them need more memory than most machines have. Hence:

- runs are cut to `LONGEST_RUN` characters before they are counted (a line of base64 is no word);
- once the distinct ones add up to a budget, a new run is halved until its pieces are known ones or
  single characters. Those are counted as before, so what is frequent stays exact to the end.

Only the counting sees this. The tokenizer itself is the same, and so is its `tokenizer.json`.
"""

import re
from collections.abc import Iterable, Iterator

LONGEST_RUN = 32  # characters; a longer word is cut where counting sees it
DISTINCT_BYTES = 30_000_000  # of different runs, in UTF-8: about 3 GB in the trainer
# As the pre-tokenizer splits: letters, then symbols, then white space. Only long ones matter of
# the latter two: they do not carry on from clause to clause.
RUNS = re.compile(
    rf"[^\W\d_]+|(?:[^\w\s]|_){{{LONGEST_RUN + 1},}}|\s{{{LONGEST_RUN + 1},}}"
)  # fmt: skip
CUT = "\n"  # between two pieces: a pre-token of one byte, which no merge can come from


class Pieces(Iterator[str]):
    """An iterator over documents as the trainer counts them.

    Args:
        documents: texts.
        budget: bytes (UTF-8) of distinct runs of letters to remember.

    Attributes:
        documents, size: texts and bytes (UTF-8) that have passed.
        distinct: runs remembered.
        halved: runs that came after the budget was used up, and were counted in pieces.
    """

    def __init__(self, documents: Iterable[str], budget: int = DISTINCT_BYTES):
        self._documents, self._left = iter(documents), budget
        self._known: set[str] = set()
        self.documents = self.size = self.halved = 0

    @property
    def distinct(self) -> int:
        """Runs of letters remembered."""
        return len(self._known)

    def __next__(self) -> str:
        text = next(self._documents)
        self.documents += 1
        self.size += len(text.encode())
        new = set(RUNS.findall(text)) - self._known
        size = sum(len(run.encode()) for run in new)
        if size < self._left and max(map(len, new), default=0) <= LONGEST_RUN:
            self._known |= new  # the usual case, several times as fast as looking at each run
            self._left -= size
            return text
        return RUNS.sub(self._cut, text)

    def _cut(self, match: re.Match) -> str:
        run = match[0]
        if run in self._known:
            return run
        if run[0].isspace():
            return run[:LONGEST_RUN]  # white space cannot be cut by white space
        if len(run) <= LONGEST_RUN:
            return self._remember(run)
        starts = range(0, len(run), LONGEST_RUN)
        return CUT.join(self._remember(run[start : start + LONGEST_RUN]) for start in starts)

    def _remember(self, run: str) -> str:
        """The run, or its pieces with cuts between them."""
        if run in self._known or len(run) == 1 or not run[0].isalpha():
            return run
        size = len(run.encode())
        if size <= self._left:
            self._known.add(run)
            self._left -= size
            return run
        self.halved += 1
        return CUT.join(self._halve(run))

    def _halve(self, run: str) -> Iterator[str]:
        if run in self._known or len(run) == 1:
            yield run
            return
        middle = (len(run) + 1) // 2
        yield from self._halve(run[:middle])
        yield from self._halve(run[middle:])
