"""Every invariant of the scheduler, stated whole."""

from __future__ import annotations

from collections.abc import Iterable

from jaxcept.scheduler.book import ArrivalQueue, Book
from jaxcept.scheduler.memory import ContextMemory
from jaxcept.scheduler.planner import Flight
from jaxcept.scheduler.prefix import block_digest
from jaxcept.scheduler.sequence import SeqState, Sequence
from jaxcept.scheduler.swaps import Swaps


def check_all(book: Book, memory: ContextMemory, swaps: Swaps, flights: Iterable[Flight]) -> None:
    """AssertionError, with what is wrong, unless everything adds up."""
    _check_places(book)
    _check_rows(book)
    loads = [seq.load.blocks for seq in book.sequences.values() if seq.load is not None]
    memory.pool.check([*(seq.blocks for seq in book.sequences.values()), *loads])
    swaps.host.pool.check([seq.host for seq in book.sequences.values()])
    _check_host_parts(book, swaps, memory.block_size)
    flights = list(flights)
    for seq in book.sequences.values():
        _check_counts(seq, memory)
        _check_pending(seq, flights)
        _check_writable(seq, memory)
        assert (seq.mask is not None) == (seq.seq_id in book.masked), f"sequence {seq.seq_id}: masked disagrees"
    assert set(book.masked) <= set(book.sequences), "a finished sequence is masked"
    _check_digests(book, memory)
    assert not memory.moves, "block moves are planned and in no plan"


def _check_host_parts(book: Book, swaps: Swaps, size: int) -> None:
    for seq in book.sequences.values():
        name = f"sequence {seq.seq_id}"
        assert (seq.load is not None) == (seq.seq_id in swaps.loading), f"{name}: loading disagrees"
        if not seq.host:
            assert seq.host_tokens == 0 and seq.load is None, f"{name}: remembers a host part that is gone"
            continue
        end = seq.host_start + len(seq.host)
        assert len(seq.blocks) <= seq.host_start, f"{name}: has blocks on the device and on the host"
        assert (end - 1) * size < seq.host_tokens <= end * size, f"{name}: {seq.host_tokens} tokens do not fit its part"
        assert seq.host_tokens <= len(seq.token_ids), f"{name}: the host holds tokens that it has not"
        if seq.load is not None:
            load = seq.load
            assert seq.state is SeqState.RUNNING, f"{name} is {seq.state} and loads"
            assert len(load.blocks) == len(seq.host), f"{name}: loads into too few or too many blocks"
            counts = (0, load.num_landed, load.num_arrived, load.num_requested, len(load.blocks))
            assert list(counts) == sorted(counts), f"{name}: lands before it asks: {counts}"


def _check_places(book: Book) -> None:
    for queue in (book.prefilling, book.decoding):
        _check_queue(queue)
    ranks = [seq.queue_key for seq in book.waiting]
    assert ranks == sorted(ranks), f"the waiting queue is out of order: {ranks}"
    expected = {
        SeqState.WAITING: set(book.waiting),
        SeqState.RUNNING: {*book.prefilling, *book.decoding},
        SeqState.INTERCEPTED: set(book.intercepted.values()),
    }
    places = [*book.waiting, *book.prefilling, *book.decoding, *book.intercepted.values()]
    assert len(set(places)) == len(places), "a sequence is in two places"
    assert set(places) == set(book.sequences.values()), "a sequence is in no place, or a finished one in some"
    for seq_id, seq in book.sequences.items():
        assert seq.seq_id == seq_id and seq in expected[seq.state], f"sequence {seq_id} is {seq.state} elsewhere"
        assert seq.is_decoding == (seq in set(book.decoding)), f"sequence {seq_id}: is_decoding is wrong"
        assert (seq.state is SeqState.INTERCEPTED) <= (seq.opened is not None), f"sequence {seq_id} has no record"
        assert seq.family is book.families.get(seq.request.request_id), f"sequence {seq_id} has no family"
        idle = seq.state is not SeqState.RUNNING and bool(seq.blocks)
        assert idle == (seq_id in book.holders), f"sequence {seq_id}: holders disagree"
    assert set(book.holders) <= set(book.sequences), "a finished sequence holds"
    members = [seq for family in book.families.values() for seq in family.sequences]
    assert set(members) == set(places) and len(members) == len(places), "families and sequences disagree"


def _check_queue(queue: ArrivalQueue) -> None:
    keys = [seq.key for seq in queue]
    assert keys == sorted(keys), f"a queue is out of order: {keys}"


def _check_rows(book: Book) -> None:
    rows = [seq.row for seq in (*book.prefilling, *book.decoding)]
    assert None not in rows, "a running sequence has no row"
    assert sorted([*book.free_rows, *(row for row in rows if row is not None)]) == list(
        range(book.config.max_num_seqs)
    ), "rows are lost or given out twice"
    for seq in (*book.waiting, *book.intercepted.values()):
        assert seq.row is None, f"sequence {seq.seq_id} is {seq.state} and has a row"


def _check_counts(seq: Sequence, memory: ContextMemory) -> None:
    name, size = f"sequence {seq.seq_id}", memory.block_size
    num_tokens = len(seq.token_ids) + seq.num_pending
    assert 0 <= seq.num_computed <= len(seq.blocks) * size, f"{name}: KV outside its blocks"
    assert seq.num_computed <= num_tokens, f"{name}: more computed than there is"
    exclusive = sum(memory.pool.refs[block] == 1 for block in seq.blocks)
    assert memory.num_exclusive(seq) == exclusive, f"{name}: the count of exclusive blocks is stale"
    assert seq.num_registered * size <= seq.num_computed, f"{name}: registered what is not computed"
    assert num_tokens <= memory.config.max_len, f"{name}: {num_tokens} tokens"
    assert len(seq.blocks) <= memory.config.blocks_for(num_tokens), f"{name}: holds blocks that it has no tokens for"
    if seq.is_decoding:
        assert seq.num_computed + 1 == num_tokens, (
            f"{name}: decodes but {seq.num_computed} of {num_tokens} are computed"
        )
        assert seq.attention == min(len(seq.blocks) * size, seq.last_position), f"{name}: attention is wrong"
    elif seq.state is SeqState.RUNNING:
        assert seq.num_computed < len(seq.token_ids) and not seq.num_pending, f"{name}: has nothing to prefill"
    outputs = sum(stop - start for start, stop in seq.output_spans)
    assert outputs == seq.num_output, f"{name}: output spans and counts disagree"
    assert seq.num_returned == sum(record.num_returned for record in seq.interceptions) + (
        seq.opened.num_returned if seq.opened is not None else 0
    ), f"{name}: returned ids and records disagree"


def _check_pending(seq: Sequence, flights: list[Flight]) -> None:
    drawn = sum(seq in flight.seqs and seq.seq_id not in flight.dropped for flight in flights)
    assert drawn == seq.num_pending, f"sequence {seq.seq_id}: {drawn} draws in flight, {seq.num_pending} pending"
    assert not (seq.num_pending and seq.state is SeqState.INTERCEPTED), f"sequence {seq.seq_id} draws while intercepted"


def _check_writable(seq: Sequence, memory: ContextMemory) -> None:
    if seq.state is SeqState.RUNNING:
        assert memory.is_writable(seq), f"sequence {seq.seq_id} would write into a block of somebody else's"
        start = seq.num_computed // memory.block_size
        for block in seq.blocks[start:]:
            assert memory.pool.refs[block] == 1, f"sequence {seq.seq_id}: block {block} is to be written and is shared"


def _check_digests(book: Book, memory: ContextMemory) -> None:
    """Registered blocks are named by the tokens and the salt of whoever holds them."""
    for seq in book.sequences.values():
        parent = seq.family.root
        for index, digest in enumerate(seq.digests):
            start = index * memory.block_size
            parent = block_digest(parent, seq.token_ids[start : start + memory.block_size])
            assert digest == parent, f"sequence {seq.seq_id}: the digest of block {index} is stale"
        for index, block in enumerate(seq.blocks):
            found = memory.pool.digest(block)
            assert found is None or found == seq.digest(index, memory.block_size), (
                f"sequence {seq.seq_id}: block {index} is registered as something else"
            )
