"""The block pool, by hand."""

import pytest

from jaxcept.scheduler.blocks import BlockPool


def test_blocks_go_out_lowest_first_and_come_back():
    pool = BlockPool(3)
    assert [pool.allocate(), pool.allocate()] == [0, 1]
    assert (pool.num_available, pool.num_held, pool.num_cached) == (1, 2, 0)
    pool.check([[0, 1]])
    pool.release([0, 1])
    assert [pool.allocate(), pool.allocate(), pool.allocate()] == [0, 1, 2]
    pool.check([[0, 1, 2]])


def test_a_cached_block_is_found_until_it_is_the_least_recently_used():
    pool = BlockPool(2)
    table = [pool.allocate(), pool.allocate()]
    pool.register(table[0], b"head")
    pool.register(table[1], b"tail")
    pool.release(table)
    assert (pool.num_cached, pool.num_available) == (2, 2)
    assert pool.allocate() == table[1], "a context's tail goes before its head"
    assert pool.find(b"tail") is None and pool.find(b"head") == table[0]
    assert pool.num_evictions == 1
    pool.share(table[0])
    pool.check([[table[0]], [table[1]]])
    assert pool.num_available == 0


def test_free_blocks_go_before_cached_ones():
    pool = BlockPool(2)
    block = pool.allocate()
    pool.register(block, b"a")
    pool.release([block])
    assert pool.allocate() == 1
    assert pool.find(b"a") == block


def test_a_shared_block_is_held_until_its_last_holder_lets_go():
    pool = BlockPool(1)
    block = pool.allocate()
    pool.share(block)
    assert pool.num_exclusive([block]) == 0
    pool.check([[block], [block]])
    pool.release([block])
    assert pool.num_exclusive([block]) == 1 and pool.num_available == 0
    pool.release([block])
    assert pool.num_available == 1
    with pytest.raises(AssertionError, match="released more often"):
        pool.release([block])


def test_the_first_block_with_some_content_stays_the_one_that_is_found():
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, b"same")
    pool.register(second, b"same")
    assert pool.find(b"same") == first and pool.digest(second) is None
    pool.forget(first)
    assert pool.find(b"same") is None
    pool.share(second)
    with pytest.raises(AssertionError, match="2 holders"):
        pool.forget(second)


def test_a_run_ends_at_the_first_digest_that_is_not_there():
    pool = BlockPool(3)
    blocks = [pool.allocate() for _ in range(3)]
    pool.register(blocks[0], b"a")
    pool.register(blocks[2], b"c")
    assert pool.find_run([b"a", b"b", b"c"]) == [blocks[0]]
    assert pool.find_run([b"c", b"a"]) == [blocks[2], blocks[0]]


def test_check_sees_what_does_not_add_up():
    pool = BlockPool(2)
    block = pool.allocate()
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check([])
    with pytest.raises(AssertionError, match="twice"):
        pool.check([[block, block]])
    with pytest.raises(AssertionError, match="no block available"):
        [pool.allocate() for _ in range(2)]
    with pytest.raises(ValueError, match="num_blocks=-1"):
        BlockPool(-1)
