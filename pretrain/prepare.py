"""Tokenize text and pack it into blocks of equal length.

Reads   text files (`data_files`), the tokenizer's directory
Writes  train-*.parquet, validation-*.parquet (column `input_ids`), meta.json, the tokenizer

    python -m pretrain.prepare --config configs/tiny/prepare.yaml
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

import stages
from pretrain.hardware import set_up_process
from tokenizer.corpus import read_documents, split_documents

BLOCKS_PER_SHARD = 65_536
DOCUMENTS_PER_BATCH = 1_000


@dataclass
class PrepareArguments:
    """What is packed, by which tokenizer, how long a block is."""

    data_files: list[str] = field(default_factory=list, metadata={"help": "training text"})
    validation_files: list[str] = field(default_factory=list, metadata={"help": "held-out text"})
    validation_share: float = field(
        default=0.1, metadata={"help": "held out of data_files where there are no validation_files"}
    )
    tokenizer: str = "output/my/tokenizer"
    output_dir: str = "output/my/prepare"
    block_size: int = field(default=256, metadata={"help": "tokens a block: the model's context"})
    seed: int = field(default=42, metadata={"help": "order of the documents"})


def main(args: PrepareArguments) -> None:
    """Read, split, shuffle, tokenize, pack, record."""
    set_up_process()
    from transformers import AutoTokenizer

    stages.require_input(args.tokenizer, "tokenizer.json")
    data_files = args.data_files + args.validation_files
    run = stages.start_run("prepare", args.output_dir, [args], [args.tokenizer], data_files)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if args.validation_files:
        train, validation = map(list, map(read_documents, (args.data_files, args.validation_files)))
    else:
        documents = read_documents(args.data_files)
        train, validation = split_documents(documents, args.validation_share, args.seed)
    random.Random(args.seed).shuffle(train)

    tokenizer.save_pretrained(args.output_dir)
    meta = {"block_size": args.block_size, "tokenizer": stages.hash_outputs(args.tokenizer)}
    for split, documents in (("train", train), ("validation", validation)):
        meta[split] = write_split(split, documents, tokenizer, args)
    stages.write_json(Path(args.output_dir) / "meta.json", meta)
    counts = {
        f"{split}_{name}": {"value": meta[split][name], "unit": name}
        for split in ("train", "validation")
        for name in ("documents", "tokens", "blocks", "dropped_tokens")
    }
    run.finish(counts)


def write_split(split: str, documents: list[str], tokenizer, args: PrepareArguments) -> dict:
    """Pack one split into parquet shards.

    Returns:
        Counts: documents, bytes (UTF-8), tokens, blocks, dropped_tokens (the last block's rest).
    """
    counts = {
        "documents": len(documents),
        "bytes": sum(len(text.encode()) for text in documents),
        "tokens": 0,
    }
    shown = tqdm(documents, desc=f"prepare {split}", unit=" documents", disable=None)
    ids = count_tokens(tokenize(shown, tokenizer), counts)
    blocks = pack(ids, args.block_size)
    counts["blocks"] = 0
    for shard, rows in enumerate(iter(lambda: list(islice(blocks, BLOCKS_PER_SHARD)), [])):
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


def tokenize(documents: Iterable[str], tokenizer) -> Iterator[list[int]]:
    """Token ids of each document, between <bos> and <eos>."""
    documents = iter(documents)
    while batch := list(islice(documents, DOCUMENTS_PER_BATCH)):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            yield [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]


def count_tokens(ids: Iterable[list[int]], counts: dict) -> Iterator[list[int]]:
    """Pass documents on and add their lengths to `counts["tokens"]`."""
    for document in ids:
        counts["tokens"] += len(document)
        yield document


def pack(documents: Iterable[list[int]], block_size: int) -> Iterator[list[int]]:
    """Concatenate documents and cut into blocks; a document may go on in the next block."""
    buffer: list[int] = []
    for ids in documents:
        buffer.extend(ids)
        while len(buffer) >= block_size:
            yield buffer[:block_size]
            buffer = buffer[block_size:]


if __name__ == "__main__":
    main(*stages.parse_args([PrepareArguments]))
