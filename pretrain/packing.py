"""Packed blocks on disk: documents one after the other, cut into blocks of equal length."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TOKENS_PER_SHARD = 1 << 24  # 64 MB in memory, about half of it on disk


class Shards:
    """Writes the shards of one split: train-00000.parquet, ..., with a column `input_ids`.

    No token is lost or made between the blocks: a document may go on in the next block, and in the
    next shard. Only what does not fill the last block of all is left, `dropped_tokens`. A shard
    that is there already is not written again; the caller removes those of other settings.
    """

    def __init__(self, directory: Path, split: str, block_size: int):
        self.blocks = self.dropped_tokens = 0
        self._directory, self._split, self._block_size = directory, split, block_size
        self._blocks_per_shard = max(1, TOKENS_PER_SHARD // block_size)
        self._held, self._size, self._count = [], 0, 0

    def add(self, ids: np.ndarray) -> None:
        """Append a document's ids (N,)."""
        self._held.append(ids)
        self._size += len(ids)
        if self._size >= self._blocks_per_shard * self._block_size:
            self._write()

    def close(self) -> None:
        """Write what is left, but for the last incomplete block."""
        if self._size >= self._block_size:
            self._write()
        self.dropped_tokens, self._held, self._size = self._size, [], 0

    def _write(self) -> None:
        ids = np.concatenate(self._held)
        per_shard = self._blocks_per_shard * self._block_size
        while len(ids) >= self._block_size:
            whole = min(len(ids) // self._block_size * self._block_size, per_shard)
            self._write_shard(ids[:whole])
            ids = ids[whole:]
            if len(ids) < per_shard:
                break
        self._held, self._size = [ids.copy()], len(ids)

    def _write_shard(self, ids: np.ndarray) -> None:
        self.blocks += len(ids) // self._block_size
        path = self._directory / f"{self._split}-{self._count:05d}.parquet"
        self._count += 1
        if path.exists():
            return
        offsets = np.arange(0, len(ids) + 1, self._block_size, dtype=np.int32)
        rows = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids.astype(np.int32)))
        table = pa.table({"input_ids": rows})
        pq.write_table(table, path.with_suffix(".partial"), compression="zstd")
        path.with_suffix(".partial").replace(path)
