"""Packed blocks for the trainer."""

import os
from itertools import islice, pairwise
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


def unpack_documents(blocks: Dataset, tokenizer, limit: int) -> list[str]:
    """The text of the first `limit` documents of packed blocks; the last of all may be cut."""
    ids = [token for block in blocks["input_ids"] for token in block.tolist()]
    starts = [i for i, token in enumerate(ids) if token == tokenizer.bos_token_id]
    documents = (ids[start:end] for start, end in pairwise([*starts, len(ids)]))
    return tokenizer.batch_decode(list(islice(documents, limit)), skip_special_tokens=True)


class PackedCollator:
    """Stack blocks, and mark where their documents begin.

    Positions start again at 0 at every <bos>: no token attends to another document, and a packed
    document gets the logits it would get alone. <bos> itself is never a label, since nothing of
    its own document precedes it; nor is a block's first token, since nothing precedes it at all
    and transformers' Trainer, which divides by the number of labels, would count it.
    """

    def __init__(self, bos_token_id: int):
        self.bos_token_id = bos_token_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Rows of `input_ids` (T,) -> `input_ids`, `position_ids`, `labels`, each (B, T) int64."""
        input_ids = torch.stack([row["input_ids"] for row in rows]).long()
        starts = input_ids == self.bos_token_id
        index = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        last_start = torch.where(starts, index, 0).cummax(dim=1).values
        return {
            "input_ids": input_ids,
            "position_ids": index - last_start,
            "labels": input_ids.masked_fill(starts | (index == 0), -100),
        }
