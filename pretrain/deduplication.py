"""Documents that were seen before: the same text, or nearly the same.

Exact duplicates have one hash in common. Near duplicates (Broder 1997, "On the resemblance and
containment of documents") share most of their runs of five words: MinHash estimates that share,
and locality-sensitive hashing finds the candidates, by keys of which near duplicates have one in
common. Both come from datasketch; the keys seen are kept here, in 8 bytes each, where an index of
Python objects would outgrow the memory before the corpus ends.
"""

import re

import numpy as np

PERMUTATIONS = 128
AT_ONCE = 1 << 14  # runs of words; a book's million would take a gigabyte
SHINGLE = 5  # words; as Penedo et al. 2024 (FineWeb) take them
# A word is a run of letters and digits; a Chinese, Japanese or Korean character is one alone.
_WIDE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
WORD = re.compile(f"[{_WIDE}]|[^\\W{_WIDE}]+")


def hash_ngrams(text: str, length: int) -> np.ndarray:
    """64-bit hashes (N,) of the runs of `length` words of a text, case apart; fewer words: none."""
    from xxhash import xxh3_64_intdigest

    words = WORD.findall(text.casefold())
    count = len(words) - length + 1
    if count < 1:
        return np.empty(0, np.uint64)
    hashed = map(xxh3_64_intdigest, map(str.encode, words))
    hashes = np.fromiter(hashed, np.uint64, len(words))
    ngrams = np.zeros(count, np.uint64)
    for start in range(length):  # a polynomial, modulo 2^64
        ngrams = ngrams * np.uint64(0x9E3779B97F4A7C15) + hashes[start : start + count]
    return ngrams ^ (ngrams >> np.uint64(31))


def hash_text(text: str) -> int:
    """64-bit hash of a text without its outer white space."""
    from xxhash import xxh3_64_intdigest

    return xxh3_64_intdigest(text.strip().encode("utf-8", "surrogatepass"))


class NearDuplicateKeys:
    """Keys of documents; near duplicates have at least one in common, others seldom have.

    The chance that two documents with a share s of runs in common meet is 1 - (1 - s^r)^b, with b
    bands of r rows that datasketch chooses so that it rises steeply at the threshold.
    """

    def __init__(self, threshold: float):
        """Raises ValueError for a threshold outside of (0, 1)."""
        if not 0 < threshold < 1:
            raise ValueError(f"near_duplicates={threshold} must lie between 0 and 1, e.g. 0.8")
        from datasketch import MinHash, MinHashLSH

        index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self.bands, self.rows = index.b, index.r
        self._minhash = MinHash(PERMUTATIONS, hashfunc=int)

    def __call__(self, text: str) -> np.ndarray:
        """The keys (bands,) of a text, uint64."""
        from xxhash import xxh3_64_intdigest

        shingles = hash_ngrams(text, SHINGLE)
        if not len(shingles):  # a short text is one shingle
            shingles = np.array([hash_text(text.casefold())], np.uint64)
        self._minhash.clear()
        values = (np.unique(shingles) & np.uint64(0xFFFFFFFF)).tolist()
        for start in range(0, len(values), AT_ONCE):
            self._minhash.update_batch(values[start : start + AT_ONCE])
        values = self._minhash.hashvalues[: self.bands * self.rows].reshape(self.bands, self.rows)
        keys = [xxh3_64_intdigest(row.tobytes(), seed=band) for band, row in enumerate(values)]
        return np.array(keys, np.uint64)


class SeenKeys:
    """A growing set of 64-bit keys in sorted arrays, 8 bytes a key."""

    def __init__(self):
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def find_known(self, keys: np.ndarray) -> np.ndarray:
        """Which of documents (N,) have one of their keys (N, K) among those seen."""
        known = np.zeros(len(keys), bool)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            known |= (run[places] == keys).any(axis=1)
        return known

    def find_new(self, keys: np.ndarray) -> np.ndarray:
        """Which of documents (N,) are new, by their keys (N, K), in order; nothing is added.

        A document is new where neither what was added nor a new document before it has its keys.
        """
        known, found = self.find_known(keys), set()
        for number, row in enumerate(keys.tolist()):
            known[number] = known[number] or not found.isdisjoint(row)
            if not known[number]:
                found.update(row)
        return ~known

    def add(self, keys: np.ndarray) -> None:
        """Add keys (N,). Runs are merged as they grow alike, so that there are few of them."""
        if len(keys):
            self._runs.append(np.sort(keys))
        while len(self._runs) > 1 and 2 * len(self._runs[-1]) > len(self._runs[-2]):
            last = self._runs.pop()
            self._runs[-1] = np.sort(np.concatenate([self._runs[-1], last]), kind="stable")
