"""Tokenize text and pack it into blocks of equal length.

Reads   text files or Hub data sets (`data_files`), whole or as a mixture; the tokenizer
Writes  train-*.parquet, validation-*.parquet (column `input_ids`), meta.json, the tokenizer

    python -m pretrain.prepare --config configs/tiny/prepare.yaml
    python -m pretrain.prepare --data_files prose.txt@0.8 code.jsonl@0.2 --max_tokens 1_000_000 \
        --tokenizer output/tiny/tokenizer --output_dir output/my/prepare
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

import stages
from pretrain.hardware import set_up_process
from tokenizer.corpus import read_documents, split_documents
from tokenizer.mixture import check_budget, interleave, open_sources, parse_shares, take

TOKENS_PER_SHARD = 1 << 24  # 64 MB in memory, about half of it on disk
DOCUMENTS_PER_BATCH = 1_000
CHARACTERS_PER_BATCH = 1 << 22  # a thousand books would not fit into memory


@dataclass
class PrepareArguments:
    """What is packed, by which tokenizer, how long a block is."""

    data_files: list[str] = field(
        default_factory=list, metadata={"help": "training text; name@share, ... for a mixture"}
    )
    validation_files: list[str] = field(default_factory=list, metadata={"help": "held-out text"})
    validation_share: float = field(
        default=0.1, metadata={"help": "held out of data_files where there are no validation_files"}
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "training tokens taken from a mixture; None reads all"}
    )
    tokenizer: str = "output/my/tokenizer"
    output_dir: str = "output/my/prepare"
    block_size: int = field(default=256, metadata={"help": "tokens a block: the model's context"})
    seed: int = field(default=42, metadata={"help": "order of the documents"})


class Document(NamedTuple):
    """One tokenized document: where it is from, its UTF-8 bytes, and its ids."""

    source: str
    size: int
    ids: list[int]


def main(args: PrepareArguments) -> None:
    """Read, split, shuffle, tokenize, pack, record."""
    set_up_process()
    from transformers import AutoTokenizer

    check_budget(args.data_files, args.max_tokens, "max_tokens")
    stages.require_input(args.tokenizer, "tokenizer.json")
    data_files = [*parse_shares(args.data_files), *args.validation_files]
    run = stages.start_run("prepare", args.output_dir, [args], [args.tokenizer], data_files)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.save_pretrained(args.output_dir)
    meta = {"block_size": args.block_size, "tokenizer": stages.hash_outputs(args.tokenizer)}
    read = read_all if args.max_tokens is None else read_mixture
    for split, documents in read(args, tokenizer).items():
        meta[split] = write_split(split, documents, args)
    if args.max_tokens is not None:
        meta["shares"] = parse_shares(args.data_files)
    stages.write_json(Path(args.output_dir) / "meta.json", meta)
    counts = {
        f"{split}_{name}": {"value": meta[split][name], "unit": name}
        for split in ("train", "validation")
        for name in ("documents", "tokens", "blocks", "dropped_tokens")
    }
    run.finish(counts)


def read_all(args: PrepareArguments, tokenizer) -> dict[str, Iterator[Document]]:
    """Every document of the files, split and shuffled in memory."""
    if args.validation_files:
        train, validation = map(list, map(read_documents, (args.data_files, args.validation_files)))
    else:
        documents = read_documents(args.data_files)
        train, validation = split_documents(documents, args.validation_share, args.seed)
    random.Random(args.seed).shuffle(train)
    return {
        "train": tokenize(train, tokenizer),
        "validation": tokenize(validation, tokenizer),
    }


def read_mixture(args: PrepareArguments, tokenizer) -> dict[str, Iterator[Document]]:
    """`max_tokens` of training text from streamed sources, each in its share of the tokens.

    Without validation_files the mixture's beginning is held out: `validation_share` of the budget,
    beside it, in the same shares.
    """
    shares = parse_shares(args.data_files)
    streams = {
        name: tokenize(documents, tokenizer, name)
        for name, documents in open_sources(shares, args.seed).items()
    }
    mixed = interleave(streams, shares, _count)
    if args.validation_files:
        held_out = tokenize(read_documents(args.validation_files), tokenizer)
    else:
        held_out = take(mixed, args.validation_share * args.max_tokens, _count)
    # In this order: a mixture is read once, from its beginning.
    return {"validation": held_out, "train": take(mixed, args.max_tokens, _count)}


def _count(document: Document) -> int:
    return len(document.ids)


def write_split(split: str, documents: Iterable[Document], args: PrepareArguments) -> dict:
    """Pack one split into parquet shards.

    Returns:
        Counts: documents, bytes (UTF-8), tokens, blocks, dropped_tokens (the last block's rest);
        of a mixture also documents, bytes and tokens by source.
    """
    counts = {"documents": 0, "bytes": 0, "tokens": 0, "blocks": 0}
    shown = tqdm(documents, desc=f"prepare {split}", unit=" documents", disable=None)
    blocks = pack(count(shown, counts), args.block_size)
    blocks = (np.asarray(block, dtype=np.int32) for block in blocks)
    size = max(1, TOKENS_PER_SHARD // args.block_size)
    for shard, rows in enumerate(iter(lambda: list(islice(blocks, size)), [])):
        table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})
        path = Path(args.output_dir) / f"{split}-{shard:05d}.parquet"
        pq.write_table(table, path.with_suffix(".partial"), compression="zstd")
        path.with_suffix(".partial").replace(path)
        counts["blocks"] += len(rows)
    counts["dropped_tokens"] = counts["tokens"] - counts["blocks"] * args.block_size
    if not counts["blocks"]:
        raise ValueError(
            f"the {split} text has {counts['tokens']} tokens, less than one block of "
            f"{args.block_size}: give more text or a smaller --block_size"
        )
    return counts


def tokenize(documents: Iterable[str], tokenizer, source: str = "") -> Iterator[Document]:
    """Each document as token ids between <bos> and <eos>."""
    for batch in _batches(documents):
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        for text, ids in zip(batch, encoded, strict=True):
            ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
            yield Document(source, len(text.encode()), ids)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if len(batch) == DOCUMENTS_PER_BATCH or size > CHARACTERS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def count(documents: Iterable[Document], counts: dict) -> Iterator[list[int]]:
    """Pass the ids on, and add up what passes; what has a source also under "sources"."""
    for source, size, ids in documents:
        totals = [counts]
        if source:
            empty = {"documents": 0, "bytes": 0, "tokens": 0}
            totals.append(counts.setdefault("sources", {}).setdefault(source, empty))
        for total in totals:
            total["documents"] += 1
            total["bytes"] += size
            total["tokens"] += len(ids)
        yield ids


def pack(documents: Iterable[list[int]], block_size: int) -> Iterator[list[int]]:
    """Concatenate documents and cut into blocks; a document may go on in the next block."""
    buffer: list[int] = []
    for ids in documents:
        buffer.extend(ids)
        whole = len(buffer) // block_size * block_size
        yield from (buffer[start : start + block_size] for start in range(0, whole, block_size))
        del buffer[:whole]


if __name__ == "__main__":
    main(*stages.parse_args([PrepareArguments]))
