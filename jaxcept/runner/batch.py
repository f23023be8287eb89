"""A plan becomes one padded int32 buffer: the only file that pads.

All per-step metadata travels in one buffer, because every device argument costs dispatch time. The buffer is allocated
afresh for every step: the device may still be reading the last one.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcept.scheduler.plan import StepPlan, TableUpdate
from jaxcept_kernels.layout import AttentionMetadata

NO_ROW = -1


def token_buckets(limit: int, multiple_of: int = 1) -> tuple[int, ...]:
    """Padded sizes up to limit: powers of two, from 16 on with one size in between, so that padding stays small.

    Each rounded up to a multiple, so that as many devices can share the tokens.
    """
    sizes = [1]
    while sizes[-1] < limit:
        last = sizes[-1]
        is_power = last & (last - 1) == 0
        sizes.append(last * 3 // 2 if is_power and last >= 16 else 1 << last.bit_length())
    sizes = [*sizes[:-1], limit] if len(sizes) > 1 else [limit]
    return tuple(dict.fromkeys(-(-size // multiple_of) * multiple_of for size in sizes))


def bucket_of(buckets: tuple[int, ...], size: int) -> int:
    """The smallest bucket that holds `size`."""
    index = bisect_left(buckets, size)
    if index == len(buckets):
        raise ValueError(f"size={size}: expected at most {buckets[-1]}, the largest compiled bucket")
    return buckets[index]


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What is fixed for the life of a runner; with the token bucket it gives every size of the buffer."""

    max_num_seqs: int
    max_blocks: int  # per sequence
    block_size: int
    num_blocks: int

    def entries(self, tokens: int) -> int:
        """Batch entries beside `tokens` padded tokens: each has at least one token."""
        return min(tokens, self.max_num_seqs)

    def length(self, tokens: int) -> int:
        """Length of the packed buffer."""
        entries = self.entries(tokens)
        return 4 * tokens + (entries + 1) + entries + self.max_num_seqs + entries * self.max_blocks


class StepInputs(NamedTuple):
    """The unpacked buffer, inside the compiled step."""

    token_ids: jax.Array  # [tokens] known ids, 0 where the token is on the device
    source_rows: jax.Array  # [tokens] row whose last sampled token this is, or NO_ROW
    sample_index: jax.Array  # [max_num_seqs] token whose hidden state draws the i-th token; 0 past the end
    metadata: AttentionMetadata


def unpack(packed: jax.Array, shape: BatchShape, tokens: int) -> StepInputs:
    """Splits the buffer of `Batch.packed`; sizes are static."""
    entries = shape.entries(tokens)
    sizes = (tokens, tokens, tokens, tokens, entries + 1, entries, shape.max_num_seqs, entries * shape.max_blocks)
    parts = jnp.split(packed, list(np.cumsum(sizes))[:-1])
    ids, sources, positions, slots, starts, contexts, sample_index, tables = parts
    tables = tables.reshape(entries, shape.max_blocks)
    return StepInputs(ids, sources, sample_index, AttentionMetadata(positions, slots, starts, contexts, tables))


class Batch(NamedTuple):
    """One padded step."""

    tokens: int  # the bucket
    packed: np.ndarray  # [BatchShape.length(tokens)] int32
    sampling_rows: np.ndarray  # [draws] int32, not padded
    sampling_positions: np.ndarray  # [draws] int32, where the drawn token will stand
    chunk_starts: tuple[int, ...]  # first token row of each chunk of the plan


class BatchBuilder:
    """Holds the rows' block tables on the host and lays out each step: decodes first, then chunks."""

    def __init__(self, shape: BatchShape, buckets: tuple[int, ...]) -> None:
        self.shape = shape
        self.buckets = buckets
        self._tables = np.zeros((shape.max_num_seqs, shape.max_blocks), np.int32)

    def update_tables(self, updates: tuple[TableUpdate, ...]) -> None:
        """Writes new entries of the block tables."""
        for row, offset, block_ids in updates:
            self._tables[row, offset : offset + len(block_ids)] = block_ids

    def build(self, plan: StepPlan) -> Batch:
        """Pads the plan to its bucket. Block tables must be up to date."""
        shape = self.shape
        tokens = bucket_of(self.buckets, plan.num_tokens)
        entries = shape.entries(tokens)
        packed = np.zeros(shape.length(tokens), np.int32)
        ids, sources, positions, slots = packed[: 4 * tokens].reshape(4, tokens)
        rest = packed[4 * tokens :]
        starts, contexts = rest[: entries + 1], rest[entries + 1 : 2 * entries + 1]
        sample_index = rest[2 * entries + 1 : 2 * entries + 1 + shape.max_num_seqs]
        tables = rest[2 * entries + 1 + shape.max_num_seqs :].reshape(entries, shape.max_blocks)

        count = len(plan.decodes.rows)
        rows = np.zeros(count + len(plan.chunks), np.int32)
        rows[:count] = plan.decodes.rows
        rows[count:] = [chunk.row for chunk in plan.chunks]
        tables[: len(rows)] = self._tables[rows]
        sources[:count] = rows[:count]
        sources[count:] = NO_ROW
        positions[:count] = plan.decodes.positions
        contexts[:count] = positions[:count] + 1
        starts[: count + 1] = np.arange(count + 1)
        cursor = count
        chunk_starts = []
        for entry, chunk in enumerate(plan.chunks, start=count):
            end = cursor + len(chunk.token_ids)
            ids[cursor:end] = chunk.token_ids
            positions[cursor:end] = np.arange(chunk.start, chunk.start + end - cursor)
            contexts[entry] = chunk.start + end - cursor
            chunk_starts.append(cursor)
            starts[entry + 1] = cursor = end
        starts[len(rows) + 1 :] = cursor
        self._fill_slots(slots, positions, starts, rows, cursor)

        draws = np.ones(len(rows), np.int64)
        draws[count:] = [chunk.num_draws for chunk in plan.chunks]
        sampled = np.repeat(np.arange(len(rows)), draws)  # entries, as often as they draw
        behind = np.cumsum(draws)[sampled] - 1 - np.arange(len(sampled))  # draws of the same entry that follow
        sample_index[: len(sampled)] = starts[sampled + 1] - 1 - behind
        return Batch(tokens, packed, rows[sampled], contexts[sampled] - behind.astype(np.int32), tuple(chunk_starts))

    def _fill_slots(
        self, slots: np.ndarray, positions: np.ndarray, starts: np.ndarray, rows: np.ndarray, used: int
    ) -> None:
        size = self.shape.block_size
        row_of_token = np.repeat(rows, np.diff(starts[: len(rows) + 1]))
        block = self._tables[row_of_token, positions[:used] // size]
        slots[:used] = block * size + positions[:used] % size
        slots[used:] = self.shape.num_blocks * size  # padding is dropped on write
