"""One suite for every implementation of write_kv and paged_attention, held to NumPy in float64."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_batches import Batch, attention_in_float64, make_batch, written_pool

from jaxcept_kernels.attention import Implementation, paged_attention, write_kv
from jaxcept_kernels.layout import AttentionMetadata, KVLayout, KVPool, make_pool
from jaxcept_kernels.library import native_available
from jaxcept_kernels.reference import TileConfig
from jaxcept_kernels.scoring import Scoring

IMPLEMENTATIONS = [
    pytest.param(Implementation.XLA, id="xla"),
    pytest.param(
        Implementation.NATIVE,
        id="native",
        marks=pytest.mark.skipif(not native_available(), reason="needs the native kernels"),
    ),
    pytest.param(Implementation.PALLAS, id="pallas"),  # interpreted
]

PLAIN = Scoring(0.2)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """On a GPU XLA would round the operands of float32 products."""
    with jax.default_matmul_precision("highest"):
        yield


def make_layout(**sizes: int) -> KVLayout:
    defaults = {"num_layers": 2, "num_blocks": 64, "block_size": 16, "num_kv_heads": 2, "head_dim": 32}
    return KVLayout(**{**defaults, **sizes}, dtype=jnp.dtype(jnp.float32))


@functools.cache
def jitted_step(
    layout: KVLayout, layer: int, implementation: Implementation, tiles: TileConfig, scoring: Scoring
) -> Callable[[Batch], tuple[jax.Array, KVPool]]:
    @jax.jit
    def step(batch: Batch) -> tuple[jax.Array, KVPool]:
        pool = write_kv(batch.pool, batch.k, batch.v, batch.meta, layout, layer, implementation=implementation)
        out = paged_attention(
            batch.q, pool, batch.meta, layout, layer, scoring=scoring, implementation=implementation, tiles=tiles
        )
        return out, pool

    return step


def layer_step(
    batch: Batch,
    layout: KVLayout,
    layer: int,
    implementation: Implementation,
    tiles: TileConfig | None = None,
    scoring: Scoring = PLAIN,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Attention's result and the pool, by one jitted step that writes and then attends."""
    step = jitted_step(layout, layer, implementation, tiles or TileConfig(), scoring)
    out, pool = step(batch._replace(tables=[]))
    return np.asarray(out), (np.asarray(pool[0]), np.asarray(pool[1]))


def check(
    batch: Batch,
    layout: KVLayout,
    spans: list[tuple[int, int]],
    layer: int,
    implementation: Implementation,
    scoring: Scoring = PLAIN,
) -> None:
    out, pool = layer_step(batch, layout, layer, implementation, scoring=scoring)
    np.testing.assert_allclose(out, attention_in_float64(batch, layout, layer, spans, scoring), rtol=2e-5, atol=2e-5)
    for got, want in zip(pool, written_pool(batch, layout, layer), strict=True):
        np.testing.assert_array_equal(got, want)


MIXED = [(40, 1), (0, 37), (3, 1), (16, 16), (100, 20), (0, 1), (31, 1), (15, 2)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (4, 1), (14, 2)])
def test_mixed_batch_with_padding(implementation: Implementation, heads: int, kv_heads: int) -> None:
    layout = make_layout(num_kv_heads=kv_heads)
    batch = make_batch(np.random.default_rng(0), layout, heads, MIXED, pad_tokens=5, pad_entries=3)
    check(batch, layout, MIXED, 1, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("head_dim", [20, 64, 80, 128, 256])
def test_head_sizes(implementation: Implementation, head_dim: int) -> None:
    layout = make_layout(head_dim=head_dim)
    batch = make_batch(np.random.default_rng(1), layout, 4, MIXED[:4])
    check(batch, layout, MIXED[:4], 0, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_size", [1, 3, 40])
def test_block_sizes(implementation: Implementation, block_size: int) -> None:
    layout = make_layout(block_size=block_size, num_blocks=-(-400 // block_size) + 8)
    batch = make_batch(np.random.default_rng(2), layout, 4, MIXED, pad_tokens=1)
    check(batch, layout, MIXED, 1, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_long_contexts_span_many_chunks(implementation: Implementation) -> None:
    layout = make_layout(num_blocks=160)
    spans = [(1030, 1), (511, 1), (512, 1), (255, 2)]
    check(make_batch(np.random.default_rng(3), layout, 4, spans), layout, spans, 1, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("window", "soft_cap"), [(1, None), (19, 1.5), (256, None), (2000, 0.2), (None, 3.0)])
def test_windows_and_caps(implementation: Implementation, window: int | None, soft_cap: float | None) -> None:
    layout, scoring = make_layout(num_blocks=160), Scoring(0.2, window, soft_cap)
    spans = [(700, 1), (511, 1), (0, 40), (255, 2), (280, 70), (3, 1)]
    batch = make_batch(np.random.default_rng(14), layout, 4, spans, pad_tokens=5, pad_entries=2)
    check(batch, layout, spans, 1, implementation, scoring)
    if window == 19:
        decodes = [(before, 1) for before, _ in spans]
        batch = make_batch(np.random.default_rng(15), layout, 4, decodes, pad_tokens=2, pad_entries=2)
        check(batch, layout, decodes, 0, implementation, scoring)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_lies_before_the_window_is_not_read(implementation: Implementation) -> None:
    layout, scoring = make_layout(num_blocks=160), Scoring(0.2, 40)
    spans = [(700, 1), (300, 20)]
    batch = make_batch(np.random.default_rng(16), layout, 4, spans)
    want = attention_in_float64(batch, layout, 1, spans, scoring)
    gone = np.concatenate([batch.tables[0][: (701 - 40) // 16], batch.tables[1][: (301 - 40) // 16]])
    pool = KVPool(*(part.at[layout.num_blocks + gone].set(jnp.nan) for part in batch.pool))
    out, _ = layer_step(batch._replace(pool=pool), layout, 1, implementation, scoring=scoring)
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("scoring", "says"), [({"window": 0}, "window=0: expected 1 or more"), ({"soft_cap": 0.0}, "expected more than 0")]
)
def test_scorings_that_make_no_sense(scoring: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Scoring(0.2, **scoring)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decodes_padded_to_a_bucket(implementation: Implementation) -> None:
    layout = make_layout(num_blocks=128)
    spans = [(length, 1) for length in (3, 700, 0, 16, 129)]
    batch = make_batch(np.random.default_rng(4), layout, 8, spans, pad_tokens=3, pad_entries=3)
    check(batch, layout, spans, 0, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_batch_of_padding_alone(implementation: Implementation) -> None:
    layout = make_layout()
    batch = make_batch(np.random.default_rng(5), layout, 4, [], pad_tokens=4, pad_entries=2)
    check(batch, layout, [], 0, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_far_apart_do_not_overflow(implementation: Implementation) -> None:
    layout = make_layout()
    spans = [(300, 1), (0, 40)]
    batch = make_batch(np.random.default_rng(6), layout, 4, spans)
    batch = batch._replace(q=batch.q * 300)
    out, _ = layer_step(batch, layout, 0, implementation)
    np.testing.assert_allclose(out, attention_in_float64(batch, layout, 0, spans, PLAIN), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_nan_stays_in_its_row(implementation: Implementation) -> None:
    layout = make_layout()
    batch = make_batch(np.random.default_rng(13), layout, 4, MIXED)
    batch = batch._replace(q=batch.q.at[5, 1, 3].set(jnp.nan))
    out, _ = layer_step(batch, layout, 0, implementation)
    broken = np.isnan(out)
    assert broken[5, 1].all()
    assert broken.sum() == layout.head_dim


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=25)
@given(data=st.data())
def test_random_batches(implementation: Implementation, data: st.DataObject) -> None:
    """Shapes of two buckets, so that the examples share a few compilations."""
    group = data.draw(st.sampled_from([2, 7]))
    layout = make_layout(num_blocks=200, head_dim=24)
    tokens, entries = data.draw(st.sampled_from([(8, 8), (120, 6)]))
    count = st.just(1) if tokens == entries else st.sampled_from([1, 1, 2, 17, 20])
    span = st.tuples(st.sampled_from([0, 1, 15, 16, 17, 150, 290]), count)
    spans = data.draw(st.lists(span, min_size=1, max_size=entries))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    batch = make_batch(
        rng,
        layout,
        2 * group,
        spans,
        pad_tokens=tokens - sum(count for _, count in spans),
        pad_entries=entries - len(spans),
        columns=24,
    )
    check(batch, layout, spans, 1, implementation)


@pytest.mark.parametrize("tiles", [TileConfig(1, 16, 1), TileConfig(4, 32, 3), TileConfig(64, 4096, 64)])
def test_tile_sizes_do_not_change_the_result(tiles: TileConfig) -> None:
    layout = make_layout()
    batch = make_batch(np.random.default_rng(7), layout, 4, MIXED, pad_tokens=5, pad_entries=3)
    out, _ = layer_step(batch, layout, 0, Implementation.XLA, tiles=tiles)
    np.testing.assert_allclose(out, attention_in_float64(batch, layout, 0, MIXED, PLAIN), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_layer_may_be_traced(implementation: Implementation) -> None:
    layout = make_layout()
    batch = make_batch(np.random.default_rng(8), layout, 4, MIXED)

    def run(layer: int | jax.Array) -> tuple[jax.Array, ...]:
        pool = write_kv(batch.pool, batch.k, batch.v, batch.meta, layout, layer, implementation=implementation)
        out = paged_attention(batch.q, pool, batch.meta, layout, layer, scoring=PLAIN, implementation=implementation)
        return out, *pool

    for got, want in zip(jax.jit(run)(jnp.int32(1)), jax.jit(functools.partial(run, 1))(), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def cut_batch(batch: Batch, spans: list[tuple[int, int]], entry: int) -> Batch:
    """The same pool, one entry alone."""
    first = sum(count for _, count in spans[:entry])
    rows = slice(first, first + spans[entry][1])
    meta = AttentionMetadata(
        batch.meta.positions[rows],
        batch.meta.slots[rows],
        jnp.asarray([0, spans[entry][1]], jnp.int32),
        batch.meta.context_len[entry : entry + 1],
        batch.meta.block_tables[entry : entry + 1],
    )
    return Batch(batch.q[rows], batch.k[rows], batch.v[rows], meta, batch.pool, [])


@pytest.mark.skipif(not native_available(), reason="needs the native kernels")
@pytest.mark.parametrize("scoring", [PLAIN, Scoring(0.2, 300, 2.0)])
@pytest.mark.parametrize(("heads", "head_dim"), [(4, 64), (6, 20)])
def test_native_bits_do_not_depend_on_the_batch(heads: int, head_dim: int, scoring: Scoring) -> None:
    layout = make_layout(num_blocks=250, head_dim=head_dim)
    spans = [*MIXED, (1100, 2), (300, 1)]
    batch = make_batch(np.random.default_rng(11), layout, heads, spans)
    together, _ = layer_step(batch, layout, 0, Implementation.NATIVE, scoring=scoring)
    row = 0
    for entry, (_, count) in enumerate(spans):
        alone, _ = layer_step(cut_batch(batch, spans, entry), layout, 0, Implementation.NATIVE, scoring=scoring)
        np.testing.assert_array_equal(alone, together[row : row + count])
        row += count


@pytest.mark.skipif(not native_available(), reason="needs the native kernels")
@pytest.mark.parametrize("scoring", [PLAIN, Scoring(0.2, 100, 2.0)])
def test_native_bits_are_those_of_a_prefill_and_of_decodes(scoring: Scoring) -> None:
    layout = make_layout()
    batch = make_batch(np.random.default_rng(12), layout, 4, [(0, 300)])
    whole, pool = layer_step(batch, layout, 0, Implementation.NATIVE, scoring=scoring)
    for token in (0, 1, 31, 254, 255, 256, 257, 299):
        decode = cut_batch(batch, [(0, 300)], 0)._replace(pool=KVPool(jnp.asarray(pool[0]), jnp.asarray(pool[1])))
        rows = slice(token, token + 1)
        meta = decode.meta._replace(
            positions=decode.meta.positions[rows],
            slots=decode.meta.slots[rows],
            query_start=jnp.asarray([0, 1], jnp.int32),
            context_len=jnp.asarray([token + 1], jnp.int32),
        )
        decode = decode._replace(q=decode.q[rows], k=decode.k[rows], v=decode.v[rows], meta=meta)
        alone, _ = layer_step(decode, layout, 0, Implementation.NATIVE, scoring=scoring)
        np.testing.assert_array_equal(alone[0], whole[token])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_pool(implementation: Implementation) -> None:
    layout = KVLayout(2, 64, 16, 2, 32, jnp.dtype(jnp.bfloat16))
    batch = make_batch(np.random.default_rng(9), layout, 4, MIXED)
    out, _ = layer_step(batch, layout, 0, implementation)
    assert out.dtype == jnp.bfloat16
    want = attention_in_float64(batch, layout, 0, MIXED, PLAIN)
    np.testing.assert_allclose(out.astype(np.float64), want, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])  # for PALLAS check_gpu_offline.py holds this
def test_a_donated_pool_stays_in_place(implementation: Implementation, dtype: str) -> None:
    layout = make_layout(num_layers=4, num_blocks=512 if dtype == "float32" else 2048)
    batch = make_batch(np.random.default_rng(10), layout, 4, MIXED, poison=False)
    layout = dataclasses.replace(layout, dtype=jnp.dtype(dtype))
    batch = batch._replace(pool=make_pool(layout))

    def step(kv: KVPool, batch: Batch) -> tuple[KVPool, jax.Array]:
        out = batch.q
        for layer in range(layout.num_layers):
            k, v = batch.k + out[:, :2], batch.v + out[:, 2:]  # a layer's keys follow from the last one's output
            kv = write_kv(kv, k, v, batch.meta, layout, layer, implementation=implementation)
            out = paged_attention(out, kv, batch.meta, layout, layer, scoring=PLAIN, implementation=implementation)
        return kv, out

    jitted = jax.jit(step, donate_argnums=0)
    small = batch._replace(tables=[], pool=KVPool(jnp.zeros(1), jnp.zeros(1)))
    memory = jitted.lower(batch.pool, small).compile().memory_analysis()
    pool_bytes = 2 * batch.pool.k.nbytes
    assert memory is not None
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes // 4
    pool = make_pool(layout)
    for _ in range(3):  # the same buffers, again and again
        addresses = [part.unsafe_buffer_pointer() for part in pool]
        pool, _ = jitted(pool, small)
        assert [part.unsafe_buffer_pointer() for part in pool] == addresses
