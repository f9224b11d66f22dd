"""The tokenized documents of a source, part by part, each kept on disk until all is packed.

A part holds some millions of tokens. It is written whole or not at all; after a kill the parts that
are there are read instead of made again. What has to be remembered from one part to the next stands
in the parts: how far the source was read, and the keys by which duplicates are found. They are made
in the order in which they are used, so that a run that was killed ends like one that was not.
"""

import dataclasses
import json
import os
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.cleaning import EXACT_DUPLICATE, NEAR_DUPLICATE
from pretrain.deduplication import SeenKeys, hash_text
from pretrain.encoding import Encoded, Encoder, Encoding
from tokenizer.corpus import Documents

CHARACTERS_PER_BATCH = 1 << 18
DOCUMENTS_PER_BATCH = 4_000
PARTS_AHEAD = 2  # in the works while an earlier one is packed
EXAMPLES = 5  # of what each step removes


class Document(NamedTuple):
    """One tokenized document.

    `source` is the name that its counts stand under, `size` its UTF-8 bytes, `ids` (N,) its tokens.
    """

    source: str
    held_out: bool
    size: int
    ids: np.ndarray


class Text(NamedTuple):
    """One text to be encoded, and where it was read."""

    held_out: bool
    text: str
    place: str


@dataclasses.dataclass
class Report:
    """What became of the documents that were read, but for those that stayed.

    `removed` is {step: {"documents", "characters", "examples": [{"at", "saw", "text"}]}};
    `languages` counts documents by language, before any is removed for it.
    """

    read: int = 0
    empty: int = 0
    removed: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    languages: dict[str, int] = dataclasses.field(default_factory=dict)
    bad_rows: list[str] = dataclasses.field(default_factory=list)

    def remove(self, step: str, saw: str, text: Text) -> None:
        """Count one removed text."""
        counts = self.removed.setdefault(step, {"documents": 0, "characters": 0, "examples": []})
        counts["documents"] += 1
        counts["characters"] += len(text.text)
        if len(counts["examples"]) < EXAMPLES:
            shown = {"at": text.place, "saw": saw, "text": text.text[:200]}
            counts["examples"].append(shown)

    def add(self, other: "Report") -> None:
        """Add another report's counts, and its examples as far as there is room."""
        self.read += other.read
        self.empty += other.empty
        self.bad_rows += other.bad_rows
        self.languages = dict(Counter(self.languages) + Counter(other.languages))
        for step, counts in other.removed.items():
            own = self.removed.setdefault(step, {"documents": 0, "characters": 0, "examples": []})
            own["documents"] += counts["documents"]
            own["characters"] += counts["characters"]
            own["examples"] += counts["examples"][: EXAMPLES - len(own["examples"])]


class Part(NamedTuple):
    """Some documents of a source, in order.

    Attributes:
        ids: (tokens,) of all of them, one after the other. lengths: (N,) tokens of each.
        sizes: (N,) UTF-8 bytes. held_out: (N,) bool.
        exact_keys, near_keys: (K,) uint64, new in this part.
        position: rows of the source up to here. is_last: whether the source ends here.
    """

    ids: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    held_out: np.ndarray
    exact_keys: np.ndarray
    near_keys: np.ndarray
    position: int
    is_last: bool
    report: Report

    def write(self, path: Path) -> None:
        """Write a part beside its place, and move it there."""
        values = self._asdict() | {"report": json.dumps(dataclasses.asdict(self.report))}
        beside = path.with_suffix(".partial")
        with open(beside, "wb") as file:
            np.savez(file, **values)
            file.flush()
            os.fsync(file.fileno())  # the name must not reach the disk before the bytes
        beside.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Part":
        """Read what `write` wrote."""
        with np.load(path) as values:
            values = {name: values[name] for name in cls._fields}
        plain = {"position": int(values["position"]), "is_last": bool(values["is_last"])}
        report = Report(**json.loads(str(values["report"])))
        return cls(**values | plain | {"report": report})


class Chunk(NamedTuple):
    """The texts of a part to be, on their way through the encoder."""

    texts: list[Text]
    exact_keys: np.ndarray
    sent: np.ndarray  # indices (N,) of the texts that were sent
    futures: list["Future[Encoded]"]
    position: int
    is_last: bool
    report: Report


class Source:
    """One stream of documents, which cleans, encodes and keeps its parts.

    Args:
        name: what `Document.source` says.
        directory: where the parts are; the caller sees to it that they are of the same settings.
        read: opens the documents behind so many rows.
        split: the pieces (held_out, text) of a document.
        seen: keys of all sources' documents.
        characters_per_part: what is shuffled, and lost by a kill, together.
        seed: of the order of the documents within a part; None keeps it.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        read: Callable[[int], Documents],
        split: Callable[[str], list[tuple[bool, str]]],
        encoder: Encoder,
        encoding: Encoding,
        seen: "Seen",
        characters_per_part: int,
        seed: int | None = None,
    ):
        self.name, self.report = name, Report()
        self._directory, self._read, self._split = directory, read, split
        self._encoder, self._encoding, self._seen, self._seed = encoder, encoding, seen, seed
        self._characters_per_part = characters_per_part

    def __iter__(self) -> Iterator[Document]:
        for part in self._parts():
            self.report.add(part.report)
            ends = np.cumsum(part.lengths, dtype=np.int64).tolist()
            starts = [0, *ends]
            rows = zip(part.held_out.tolist(), part.sizes.tolist(), starts, ends, strict=False)
            for held_out, size, start, end in rows:
                yield Document(self.name, held_out, size, part.ids[start:end])

    def _parts(self) -> Iterator[Part]:
        self._directory.mkdir(parents=True, exist_ok=True)
        paths = (self._directory / f"{number:06d}.npz" for number in range(10**6))
        number, position = 0, 0
        for path in paths:
            if not path.exists():
                break
            part = Part.read(path)
            self._seen.add(part)
            yield part
            if part.is_last:
                return
            number, position = number + 1, part.position
        chunks, pending = self._chunks(position, number), deque()
        while True:
            while len(pending) < PARTS_AHEAD and (chunk := next(chunks, None)) is not None:
                pending.append(chunk)
            if not pending:
                return
            part = self._finish(pending.popleft())
            part.write(path)
            self._seen.add(part)
            yield part
            path = next(paths)

    def _chunks(self, position: int, number: int) -> Iterator[Chunk]:
        """Read texts and send them to the encoder, as many at a time as make a part."""
        documents, is_last = self._read(position), False
        while not is_last:
            texts, size, read, empty = [], 0, documents.read, documents.empty
            is_last = True
            for document in documents:
                place = documents.source
                texts += [Text(held_out, text, place) for held_out, text in self._split(document)]
                size += len(document)
                if size >= self._characters_per_part:
                    is_last = False
                    break
            report = Report(documents.read - read, documents.empty - empty)
            report.bad_rows += documents.bad_rows.messages
            documents.bad_rows.messages.clear()
            if self._seed is not None:
                random.Random(self._seed + number).shuffle(texts)
            yield self._send(texts, documents.position, is_last, report)
            number += 1

    def _send(self, texts: list[Text], position: int, is_last: bool, report: Report) -> Chunk:
        """Send to the encoder all texts but those that are sure to be duplicates."""
        if self._seen.removes_exact:
            keys = np.fromiter((hash_text(text.text) for text in texts), np.uint64, len(texts))
            (sent,) = np.nonzero(self._seen.exact.find_new(keys[:, None]))
        else:
            keys, sent = np.empty(0, np.uint64), np.arange(len(texts))
        futures, batch, size = [], [], 0
        for index in sent.tolist():
            batch.append(texts[index].text)
            size += len(batch[-1])
            if size >= CHARACTERS_PER_BATCH or len(batch) >= DOCUMENTS_PER_BATCH:
                futures.append(self._encoder.submit(batch, self._encoding))
                batch, size = [], 0
        if batch:
            futures.append(self._encoder.submit(batch, self._encoding))
        return Chunk(texts, keys, sent, futures, position, is_last, report)

    def _finish(self, chunk: Chunk) -> Part:
        """Wait for what was sent, and leave out duplicates of what came before."""
        texts, sent, report = chunk.texts, chunk.sent, chunk.report
        encoded = [future.result() for future in chunk.futures]
        removed: dict[int, tuple[str, str]] = {}
        lengths = np.zeros(len(texts), np.uint32)
        if encoded:
            lengths[sent] = np.concatenate([one.lengths for one in encoded])
            reasons = [why for one in encoded for why in one.removed]
            removed |= {int(at): why for at, why in zip(sent, reasons, strict=True) if why}
        new = np.ones(len(texts), bool)
        if self._seen.removes_exact:
            new = self._seen.exact.find_new(chunk.exact_keys[:, None])
            removed |= {int(at): (EXACT_DUPLICATE, "") for at in np.flatnonzero(~new)}
        languages = [code for one in encoded for code in one.languages]
        known = zip(languages, sent, strict=True)
        report.languages = dict(Counter(code for code, at in known if code and new[at]))
        near_keys = np.empty(0, np.uint64)
        if encoded and encoded[0].near_keys.shape[1]:
            keys = np.concatenate([one.near_keys for one in encoded])
            rows = np.flatnonzero([at not in removed for at in sent.tolist()])
            is_new = self._seen.near.find_new(keys[rows])
            removed |= {int(at): (NEAR_DUPLICATE, "") for at in sent[rows[~is_new]]}
            near_keys = np.unique(keys[rows[is_new]])
        stays = np.ones(len(texts), bool)
        for at in sorted(removed):
            stays[at] = False
            report.remove(*removed[at], texts[at])
        kept = [text for text, stay in zip(texts, stays.tolist(), strict=True) if stay]
        ids = np.concatenate([one.ids for one in encoded]) if encoded else np.empty(0, np.uint16)
        return Part(
            ids=ids if not removed else ids[np.repeat(stays, lengths)],
            lengths=lengths[stays],
            sizes=np.array([len(text.text.encode()) for text in kept], np.uint32),
            held_out=np.array([text.held_out for text in kept], bool),
            exact_keys=np.unique(chunk.exact_keys[new[: len(chunk.exact_keys)]]),
            near_keys=near_keys,
            position=chunk.position,
            is_last=chunk.is_last,
            report=report,
        )


class Seen:
    """The keys of all documents so far, of every source."""

    def __init__(self, removes_exact: bool):
        self.removes_exact = removes_exact
        self.exact, self.near = SeenKeys(), SeenKeys()

    def add(self, part: Part) -> None:
        """Add what is new in a part."""
        self.exact.add(part.exact_keys)
        self.near.add(part.near_keys)
