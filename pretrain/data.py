"""Packed blocks for the trainer."""

import hashlib
import os
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import torch
from datasets import Dataset


def load_blocks(data_dir: str | os.PathLike, split: str) -> Dataset:
    """The blocks of one split: rows with `input_ids`, a list of `block_size` ids.

    Args:
        data_dir: output of `pretrain.prepare`.
        split: "train" or "validation".
    """
    shards = sorted(Path(data_dir).glob(f"{split}-*.parquet"))
    return Dataset(pq.read_table(shards, memory_map=True)).with_format("torch")


def spread_blocks(blocks: Dataset, count: int) -> Dataset:
    """At most so many blocks, from all over: held-out files lie one after the other, unshuffled."""
    count = min(count, len(blocks))
    return blocks.select([i * len(blocks) // count for i in range(count)])


def unpack_documents(blocks: Dataset, tokenizer, limit: int) -> list[str]:
    """The text of at most `limit` documents of packed blocks; the last of all may be cut.

    They are chosen by their hash: from all files, and the same ones whatever the tokenizer.
    """
    whole = torch.cat(list(blocks["input_ids"]))
    ids = whole.tolist()
    starts = find_starts(whole, tokenizer.bos_token_id, tokenizer.eos_token_id)
    starts = starts.nonzero().flatten().tolist()
    documents = [ids[start:end] for start, end in pairwise([*starts, len(ids)])]
    texts = tokenizer.batch_decode(documents, skip_special_tokens=True)
    hashes = [hashlib.sha256(text.encode()).digest() for text in texts]
    chosen = sorted(range(len(texts)), key=hashes.__getitem__)[:limit]
    return [texts[i] for i in sorted(chosen)]


def find_starts(
    input_ids: torch.Tensor, bos_token_id: int, eos_token_id: int | None = None
) -> torch.Tensor:
    """Where documents begin in packed ids (..., T); bool of the same shape.

    GPT-2's own tokenizer has one token for both ends: it begins a document where it follows itself.
    """
    starts = input_ids == bos_token_id
    if bos_token_id != eos_token_id:
        return starts
    follows = starts.roll(1, dims=-1)
    follows[..., 0] = True
    return starts & follows


class PackedCollator:
    """Stack blocks, and mark where their documents begin.

    Positions start again at 0 at every <bos>: no token attends to another document, and a packed
    document gets the logits it would get alone. <bos> itself is never a label, since nothing of
    its own document precedes it; nor is a block's first token, since nothing precedes it at all
    and transformers' Trainer, which divides by the number of labels, would count it.

    Args:
        lengths: add `cu_seq_lens_q`, where documents begin (`pretrain.attention.packed_attention`).
    """

    def __init__(self, bos_token_id: int, eos_token_id: int | None = None, lengths: bool = False):
        self.ends, self.lengths = (bos_token_id, eos_token_id), lengths

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Rows of `input_ids` (T,) -> `input_ids`, `position_ids`, `labels`, each (B, T) int64."""
        input_ids = torch.stack([row["input_ids"] for row in rows]).long()
        starts = find_starts(input_ids, *self.ends)
        index = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        last_start = torch.where(starts, index, 0).cummax(dim=1).values
        position_ids = index - last_start
        batch = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "labels": input_ids.masked_fill(starts | (index == 0), -100),
        }
        if self.lengths:
            firsts = (position_ids.flatten() == 0).nonzero().flatten()
            batch["cu_seq_lens_q"] = torch.cat([firsts, torch.tensor([input_ids.numel()])]).int()
        return batch
