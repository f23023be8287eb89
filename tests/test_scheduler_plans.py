"""Plans checked by hand: order, budgets, rows, tables, preemption."""

from jaxcept.scheduler.events import Finished, Tokens
from jaxcept.scheduler.plan import Chunk, ChunkKind, Decodes, TableUpdate
from jaxcept.scheduler.request import PRIORITY_S, Request
from tests.fakes import Rig, next_token


def test_one_request_prefills_in_chunks_and_then_decodes():
    rig = Rig(max_num_batched_tokens=4)
    seq = rig.add("r", (1, 2, 3, 4, 5, 6), max_tokens=3)
    first = rig.step()
    assert first.chunks == (Chunk(seq, 0, ChunkKind.PREFILL, 0, (1, 2, 3, 4), False),)
    assert first.tables == (TableUpdate(0, 0, (0,)),) and first.decodes == Decodes()
    setup = first.rows[0]
    assert (setup.row, setup.seq_id, setup.token_ids, setup.num_prompt) == (0, seq, (1, 2, 3, 4, 5, 6), 6)
    second = rig.step()
    assert second.chunks == (Chunk(seq, 0, ChunkKind.PREFILL, 4, (5, 6), True),)
    assert second.tables == (TableUpdate(0, 1, (1,)),) and not second.rows
    assert rig.step().decodes == Decodes((seq,), (0,), (6,))
    fourth = rig.step()
    assert fourth.decodes.positions == (7,) and not fourth.tables
    assert rig.step() is None
    (end,) = rig.told(Finished)
    ids = [1, 2, 3, 4, 5, 6]
    for _ in range(3):
        ids.append(next_token(ids, rig.runner.seeds[0]))
    assert end.token_ids == tuple(ids) and end.output_spans == ((6, 9),)
    assert [event.token_ids for event in rig.told(Tokens)] == [(ids[6],), (ids[7],), (ids[8],)]


def test_decodes_come_first_and_the_budget_is_kept():
    rig = Rig(max_num_batched_tokens=8)
    rig.add("a", range(4), max_tokens=20)
    rig.add("b", range(50, 53), max_tokens=20)
    rig.add("c", range(100, 120), max_tokens=20)
    plans = [rig.step() for _ in range(5)]
    assert [plan.num_tokens for plan in plans] == [8, 8, 8, 8, 3]
    assert [len(plan.decodes.rows) for plan in plans] == [0, 2, 2, 2, 2]
    assert [[len(chunk.token_ids) for chunk in plan.chunks] for plan in plans] == [[4, 3, 1], [6], [6], [6], [1]]
    assert [plan.chunks[-1].samples for plan in plans] == [False, False, False, False, True]


def test_the_earliest_arrival_is_served_first_whatever_the_order_of_the_calls():
    rig = Rig(max_num_seqs=1)
    late = rig.add("late", (1, 2), max_tokens=2, arrival=5.0)
    early = rig.add("early", (3, 4), max_tokens=2, arrival=1.0)
    rig.run()
    assert [event.seq_id for event in rig.told(Finished)] == [early, late]


def test_ties_go_by_seq_id_and_rows_by_number():
    rig = Rig()
    seqs = [rig.add(name, (1, 2, i), max_tokens=5, arrival=0.0) for i, name in enumerate("abc")]
    plan = rig.step()
    assert [(chunk.seq_id, chunk.row) for chunk in plan.chunks] == list(zip(seqs, (0, 1, 2), strict=True))


def test_a_freed_row_is_taken_by_the_next_one():
    rig = Rig(max_num_seqs=2)
    rig.add("a", (1,), max_tokens=1)
    rig.add("b", (2,), max_tokens=9)
    rig.add("c", (3,), max_tokens=9)
    rig.step()
    plan = rig.step()
    assert [setup.row for setup in plan.rows] == [0]
    assert plan.tables[-1].offset == 0


def test_the_next_step_is_planned_before_the_last_token_is_known():
    rig = Rig(depth=1)
    seq = rig.add("r", (1, 2, 3), max_tokens=3)
    first, second = rig.step(), rig.step()
    assert first.chunks[0].samples and second.decodes == Decodes((seq,), (0,), (3,))
    assert [len(event.token_ids) for event in rig.told(Tokens)] == [1]
    assert rig.step().decodes.positions == (4,)
    assert rig.step() is None, "a sequence that surely ends with the pending token is not scheduled again"
    assert len(rig.told(Finished)) == 1 and rig.scheduler.counters.stale_tokens == 0


def test_an_unexpected_end_leaves_a_stale_token_that_is_dropped():
    rig = Rig(depth=1)
    token = next_token((1, 2, 3), Request("r", (1, 2, 3)).seed(0))
    rig.add("r", (1, 2, 3), max_tokens=9, stop_token_ids=[token])
    rig.run()
    (end,) = rig.told(Finished)
    assert end.token_ids == (1, 2, 3, token) and (end.reason, end.stop_reason) == ("stop", token)
    assert rig.scheduler.counters.stale_tokens == 1
    assert rig.scheduler.num_held_blocks == 0


def test_the_latest_arrival_is_preempted_and_everything_it_had_is_computed_again():
    rig = Rig(num_blocks=4, block_size=4, enable_prefix_caching=False)
    early = rig.add("early", range(7), max_tokens=6)
    late = rig.add("late", range(100, 107), max_tokens=6)
    rig.step()
    rig.step()  # both write position 7, the last slot of their second block
    third = rig.step()
    assert third.decodes.seq_ids == (early,) and third.tables == (TableUpdate(0, 2, (2,)),)
    assert rig.scheduler.counters.preemptions == 1
    rig.run()
    again = [chunk for plan in rig.runner.plans for chunk in plan.chunks if chunk.kind is ChunkKind.RECOMPUTE]
    assert [(chunk.seq_id, chunk.start, chunk.num_recomputed) for chunk in again] == [(late, 0, 8)]
    assert len(again[0].token_ids) == 9
    assert [(event.seq_id, event.num_preemptions) for event in rig.told(Finished)] == [(early, 0), (late, 1)]


def test_a_preempted_context_that_is_still_cached_is_not_computed_again():
    rig = Rig(num_blocks=5, block_size=4)
    rig.add("early", range(7), max_tokens=3)
    late = rig.add("late", range(100, 108), max_tokens=9)
    rig.run()
    assert rig.scheduler.counters.preemptions == 1
    again = [chunk for plan in rig.runner.plans for chunk in plan.chunks if chunk.kind is ChunkKind.RECOMPUTE]
    assert [(chunk.seq_id, chunk.start, chunk.num_recomputed) for chunk in again] == [(late, 8, 1)]


def test_nobody_overtakes_one_that_does_not_fit():
    rig = Rig(num_blocks=6, block_size=4)
    rig.add("running", range(13), max_tokens=4)
    big = rig.add("big", range(50, 62), max_tokens=2)
    small = rig.add("small", (1,), max_tokens=1)
    rig.run()
    order = [event.seq_id for event in rig.told(Finished)]
    assert order.index(small) >= 1 and rig.runner.plans[1].num_tokens == 1
    first_chunks = [chunk.seq_id for plan in rig.runner.plans for chunk in plan.chunks if chunk.start == 0]
    assert first_chunks.index(big) < first_chunks.index(small)


def test_a_large_request_is_not_starved_by_a_stream_of_small_ones():
    rig = Rig(num_blocks=10, block_size=4, max_num_seqs=3)
    for i in range(3):
        rig.add(f"before {i}", (i, 1, 2), max_tokens=6 + 2 * i)
    rig.step()
    big = rig.add("big", range(100, 130), max_tokens=2)
    for i in range(60):
        rig.add(f"after {i}", (i, 3, 4), max_tokens=3)
        rig.step()
    assert [event.seq_id for event in rig.told(Finished)].index(big) == 3, "all that ran before, and then it"


def test_the_watermark_keeps_room_to_grow_while_others_run():
    rig = Rig(num_blocks=10, block_size=4, watermark=0.5)
    rig.add("a", range(6), max_tokens=3)
    rig.add("b", range(20, 26), max_tokens=3)
    rig.add("c", range(40, 46), max_tokens=3)
    assert [chunk.seq_id for chunk in rig.step().chunks] == [0, 1]


def test_max_num_seqs_bounds_the_rows():
    rig = Rig(max_num_seqs=2)
    for i in range(5):
        rig.add(f"r{i}", (i,), max_tokens=3)
    running = []
    while rig.engine.has_work:
        rig.step()
        running.append(rig.scheduler.num_running)
    assert max(running) == 2 and len(rig.told(Finished)) == 5


def test_a_priority_is_worth_some_waiting_and_no_more():
    rig = Rig(max_num_seqs=1)
    rig.add("running", range(4), max_tokens=2)
    rig.step()
    rig.add("early", range(4), max_tokens=1)
    rig.add("urgent", range(4), max_tokens=1, priority=-1)
    rig.clock.advance(2 * PRIORITY_S)
    rig.add("late and urgent", range(4), max_tokens=1, priority=-1)
    rig.run()
    assert [end.request_id for end in rig.told(Finished)] == ["running", "urgent", "early", "late and urgent"]
