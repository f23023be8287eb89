"""A plan laid out by hand."""

import numpy as np
import pytest

from jaxcept.runner.batch import NO_ROW, BatchBuilder, BatchShape, bucket_of, token_buckets, unpack
from jaxcept.scheduler.plan import Chunk, ChunkKind, Decodes, StepPlan, TableUpdate

SHAPE = BatchShape(max_num_seqs=4, max_blocks=3, block_size=4, num_blocks=10)


def test_buckets_grow_with_little_padding_and_end_at_the_limit():
    assert token_buckets(1) == (1,)
    assert token_buckets(100) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100)
    assert token_buckets(64) == (1, 2, 4, 8, 16, 24, 32, 48, 64)
    assert bucket_of((1, 2, 4), 3) == 4
    with pytest.raises(ValueError, match="size=5: expected at most 4"):
        bucket_of((1, 2, 4), 5)


def test_a_mixed_plan_is_laid_out_decodes_first():
    builder = BatchBuilder(SHAPE, token_buckets(16))
    builder.update_tables((TableUpdate(2, 0, (7, 3)), TableUpdate(0, 0, (5,)), TableUpdate(1, 0, (1, 2, 9))))
    plan = StepPlan(
        step_id=0,
        decodes=Decodes(seq_ids=(20, 10), rows=(2, 0), positions=(6, 3)),
        chunks=(Chunk(11, 1, ChunkKind.PREFILL, 7, (70, 71, 72), True),),
        tables=(),
        rows=(),
        moves=(),
    )
    batch = builder.build(plan)
    assert batch.tokens == 8
    inputs = unpack(batch.packed, SHAPE, batch.tokens)
    meta = inputs.metadata
    np.testing.assert_array_equal(inputs.token_ids, [0, 0, 70, 71, 72, 0, 0, 0])
    np.testing.assert_array_equal(inputs.source_rows[:5], [2, 0, NO_ROW, NO_ROW, NO_ROW])
    np.testing.assert_array_equal(meta.positions, [6, 3, 7, 8, 9, 0, 0, 0])
    np.testing.assert_array_equal(meta.slots, [3 * 4 + 2, 5 * 4 + 3, 2 * 4 + 3, 9 * 4, 9 * 4 + 1, 40, 40, 40])
    np.testing.assert_array_equal(meta.query_start, [0, 1, 2, 5, 5])
    np.testing.assert_array_equal(meta.context_len, [7, 4, 10, 0])
    np.testing.assert_array_equal(meta.block_tables[:3], [[7, 3, 0], [5, 0, 0], [1, 2, 9]])
    np.testing.assert_array_equal(inputs.sample_index, [0, 1, 4, 0])
    np.testing.assert_array_equal(batch.sampling_rows, [2, 0, 1])
    np.testing.assert_array_equal(batch.sampling_positions, [7, 4, 10])
    assert batch.chunk_starts == (2,)


def test_a_token_is_drawn_behind_every_draft_and_before_the_first():
    builder = BatchBuilder(SHAPE, token_buckets(16))
    builder.update_tables((TableUpdate(2, 0, (7, 3)), TableUpdate(0, 0, (5,)), TableUpdate(1, 0, (1, 2, 9))))
    drafts = Chunk(10, 0, ChunkKind.DRAFT, 1, (60, 61, 62), True, num_drafts=2)
    chunks = (Chunk(11, 1, ChunkKind.PREFILL, 7, (70, 71), False), drafts)
    plan = StepPlan(0, Decodes((20,), (2,), (6,)), chunks, (), (), ())
    assert plan.sampling_seq_ids == (20, 10, 10, 10) and plan.num_tokens == 6
    batch = builder.build(plan)
    inputs = unpack(batch.packed, SHAPE, batch.tokens)
    np.testing.assert_array_equal(inputs.token_ids[:6], [0, 70, 71, 60, 61, 62])
    np.testing.assert_array_equal(inputs.sample_index, [0, 3, 4, 5])
    np.testing.assert_array_equal(batch.sampling_rows, [2, 0, 0, 0])
    np.testing.assert_array_equal(batch.sampling_positions, [7, 2, 3, 4])


def test_every_step_has_a_buffer_of_its_own():
    builder = BatchBuilder(SHAPE, token_buckets(16))
    plan = StepPlan(0, Decodes((1,), (0,), (0,)), (), (TableUpdate(0, 0, (1,)),), (), ())
    assert not np.shares_memory(builder.build(plan).packed, builder.build(plan).packed)
