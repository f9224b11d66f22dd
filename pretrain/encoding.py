"""Texts -> token ids, on all cores.

Processes, not threads: the Rust tokenizer is fast enough that turning its results into arrays
would hold up a second thread. This module is all that such a process imports.
"""

import functools
import json
import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from pretrain.cleaning import Cleaner, CleaningArguments
from pretrain.fast_bpe import FastBPE

ENCODED_HERE = 1 << 21  # characters that this process encodes itself: fewer are done sooner so


class Encoding(NamedTuple):
    """How texts are cleaned and encoded; what each process needs to know.

    `cleaning` is the JSON of `CleaningArguments`, since this has to be hashable; `overlap_file` an
    array that `hash_evaluation` made.
    """

    tokenizer_file: str
    bos_token_id: int
    eos_token_id: int
    cleaning: str = "{}"
    overlap_file: str | None = None


class Encoded(NamedTuple):
    """The documents of N texts that stay.

    Attributes:
        ids: (tokens,) of all documents, one after the other, each between <bos> and <eos>.
        lengths: (N,) tokens of each text; 0 where it was removed.
        removed: (N,) the step that removed a text and what it saw, or None.
        near_keys: (N, bands) uint64, or (N, 0) where near duplicates are kept.
        languages: (N,) codes, None where nobody asks.
    """

    ids: np.ndarray
    lengths: np.ndarray
    removed: list[tuple[str, str] | None]
    near_keys: np.ndarray
    languages: list[str | None]


def encode(texts: Sequence[str], encoding: Encoding) -> Encoded:
    """Clean and encode texts.

    A special token's text stays text: a document that says "<eos>" does not end there.
    """
    tokenizer, fast, cleaner = _load(encoding)
    languages = [cleaner.detect_language(text) for text in texts]
    removed = [cleaner.check(*one) for one in zip(texts, languages, strict=True)]
    kept = [index for index, why in enumerate(removed) if why is None]
    kept_texts = [texts[index] for index in kept]
    if isinstance(fast, FastBPE):
        encoded = map(fast.encode, kept_texts)
    else:
        rows = tokenizer.encode_batch_fast(kept_texts, add_special_tokens=False)
        encoded = (row.ids for row in rows)
    bos, eos = [encoding.bos_token_id], [encoding.eos_token_id]
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    lengths, pieces = np.zeros(len(texts), np.uint32), [np.empty(0, dtype)]
    near_keys = np.zeros((len(texts), cleaner.bands), np.uint64)
    for index, ids in zip(kept, encoded, strict=True):
        pieces += [np.asarray(part, dtype) for part in (bos, ids, eos)]
        lengths[index] = len(ids) + 2
        if cleaner.bands:
            near_keys[index] = cleaner.near_keys(texts[index])
    return Encoded(np.concatenate(pieces), lengths, removed, near_keys, languages)


def name_encoder(encoding: Encoding) -> str:
    """The library that encodes: "tiktoken", or "tokenizers" and why it is not the faster one."""
    _, fast, _ = _load(encoding)
    return "tiktoken" if isinstance(fast, FastBPE) else f"tokenizers: {fast}"


@functools.lru_cache(maxsize=2)
def _load(encoding: Encoding) -> tuple[Tokenizer, FastBPE | str, Cleaner]:
    """The tokenizer, the same by tiktoken or why it cannot be, and what cleans."""
    tokenizer = Tokenizer.from_file(encoding.tokenizer_file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    cleaning = CleaningArguments(**json.loads(encoding.cleaning))
    overlap = np.load(encoding.overlap_file) if encoding.overlap_file else np.empty(0, np.uint64)
    try:
        fast: FastBPE | str = FastBPE(tokenizer)
    except ValueError as error:
        fast = str(error)
    return tokenizer, fast, Cleaner(cleaning, overlap)


class Encoder:
    """Encodes texts in processes of its own, as many as there are cores; a context manager.

    The first texts are encoded by this process, so that a small corpus does not wait for others.
    """

    def __init__(self):
        self._characters, self._pool = 0, None

    def submit(self, texts: list[str], encoding: Encoding) -> "Future[Encoded]":
        """Start to encode texts; the future's result is an `Encoded`."""
        self._characters += sum(map(len, texts))
        if self._pool is None and self._characters <= ENCODED_HERE:
            done: Future[Encoded] = Future()
            done.set_result(encode(texts, encoding))
            return done
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(count_cores(), context, initializer=_begin_process)
        return self._pool.submit(encode, texts, encoding)

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, *error) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def count_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _begin_process() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process is one core's
    # Where the parent is killed nobody would tell its processes to end.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
