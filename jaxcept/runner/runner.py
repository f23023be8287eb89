"""Obeys plans on the device: moves blocks, runs the compiled step, draws tokens, brings their ids back.

Nothing is traced or compiled once `warm_up` is over: the runner holds one executable per padded size and calls these
alone. Every call into JAX comes from the engine's thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, Sharding

from jaxcept.runner.batch import NO_ROW, Batch, BatchBuilder, BatchShape, bucket_of, token_buckets, unpack
from jaxcept.runner.compiles import CompileCounter
from jaxcept.runner.host_pool import HeadParts, Link
from jaxcept.runner.rows import BIAS_ENTRIES, NUM_COLUMNS, HostRows, make_row_state, mask_words, set_row, unpack_params
from jaxcept.runner.sampling import Logprobs, RowState, Variant, logprobs_of, sample
from jaxcept.runner.swapper import Job, Swapper, SwapReport, split_moves
from jaxcept.scheduler.plan import BlockMove, Mask, MoveKind, RowSetup, StepPlan, StepResult, TokenLogprobs
from jaxcept_kernels.blocks import copy_blocks
from jaxcept_kernels.layout import KVPool, make_pool
from jaxcept_models.model import Model

COPIES_PER_CALL = 16
SCORE_TILE = 64
FOLLOW_DEPTH = 2  # steps under way on a host that follows another

Progress = Callable[[int, int, str], None]
Executable = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """Sizes that are compiled in; they match the scheduler's."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_host_blocks: int = 0  # pinned on the host for swaps; 0: no swaps

    def __post_init__(self) -> None:
        for name in self.__slots__:
            least = 0 if name == "num_host_blocks" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected {least} or more")


class _Tile(NamedTuple):
    """Scored tokens; the entries before `skip` belong to no target."""

    logprobs: Logprobs  # of at least skip + used entries
    skip: int
    used: int


class _InFlight(NamedTuple):
    """A submitted step whose ids are on their way to the host."""

    plan: StepPlan
    num_drawn: int
    tokens: jax.Array | None  # [padded num_drawn]
    logprobs: Logprobs | None
    wanted: tuple[int | None, ...]  # [num_drawn] logprobs that each sequence asked for
    scores: dict[int, tuple[int, list[_Tile]]]  # chunk index → prompt_logprobs asked for, tiles


class DeviceRunner:
    """Runs a model over a paged KV pool, one plan at a time, in the order of submission."""

    def __init__(
        self, model: Model, config: RunnerConfig, link: Link | None = None, shapes_on: Sharding | None = None
    ) -> None:
        """`link` is the way to the host, where it is not the device's own.

        With `shapes_on` the runner has shapes with this sharding where arrays would be, for a device that need not be
        there: it runs nothing and takes no memory, and serves its `lowerings` alone. A model on a mesh says itself
        where everything lies.
        """
        if config.max_model_len > model.config.max_position_embeddings:
            raise ValueError(
                f"max_model_len={config.max_model_len}: the model was trained for "
                f"{model.config.max_position_embeddings} positions; choose at most that"
            )
        self.model = model
        self.config = config
        on = self._placement = model.placement
        self.layout = model.kv_layout(config.num_blocks, config.block_size)
        self.compiles = CompileCounter()
        max_blocks = -(-config.max_model_len // config.block_size)
        self._shape = BatchShape(config.max_num_seqs, max_blocks, config.block_size, config.num_blocks)
        self._token_buckets = token_buckets(config.max_num_batched_tokens, 1 if on is None else on.parallel.data)
        self._sample_buckets = {v: sample_buckets(config.max_num_seqs, v) for v in Variant}
        self._builder = BatchBuilder(self._shape, self._token_buckets)
        self._rows = HostRows(config.max_num_seqs, config.max_model_len, model.config.vocab_size)

        def make_arrays() -> tuple[KVPool, RowState]:
            rows = make_row_state(config.max_num_seqs, config.max_model_len, model.config.vocab_size)
            return make_pool(self.layout), rows

        self._pool: KVPool
        self._state: RowState
        places = (shapes_on, shapes_on) if on is None else (on.pool, on.batch)
        self._pool, self._state = _lay_out(make_arrays, places, only_shapes=shapes_on is not None)
        self.swapper: Swapper | None = None
        if config.num_host_blocks:
            sharding = self._pool.k.sharding
            self.swapper = Swapper(self.layout, config.num_host_blocks, sharding, link, model.implementation)
        self._in_flight: deque[_InFlight] = deque()
        self._step: dict[int, Executable] = {}
        self._sample: dict[tuple[int, Variant], Executable] = {}
        self._score: dict[int, Executable] = {}
        self._set_row: Executable
        self._copy: Executable

    # The compiled borders.

    def _forward(
        self, weights: tuple[jax.Array, ...], pool: KVPool, last_tokens: jax.Array, packed: jax.Array, tokens: int
    ) -> tuple[KVPool, jax.Array, jax.Array]:
        inputs = unpack(packed, self._shape, tokens)
        on_device = last_tokens[jnp.maximum(inputs.source_rows, 0)]
        ids = jnp.where(inputs.source_rows != NO_ROW, on_device, inputs.token_ids)
        hidden, pool = self.model.forward(weights, ids, inputs.metadata, pool, self.layout)
        return pool, hidden, hidden[inputs.sample_index]

    def _draw(
        self,
        weights: tuple[jax.Array, ...],
        hidden: jax.Array,
        state: RowState,
        packed: jax.Array,
        mask: jax.Array | None,
        variant: Variant,
    ) -> tuple[jax.Array, RowState, Logprobs | None]:
        logits = self.model.logits(weights, hidden[: packed.shape[0]])
        return sample(logits, unpack_params(packed), state, variant, mask)

    def _score_tile(
        self, weights: tuple[jax.Array, ...], hidden: jax.Array, start: jax.Array, targets: jax.Array
    ) -> Logprobs:
        tile = jax.lax.dynamic_slice_in_dim(hidden, start, targets.shape[0])
        return logprobs_of(self.model.logits(weights, tile), targets)

    def warm_up(self, progress: Progress | None = None, meet: Callable[[], None] | None = None) -> None:
        """Compiles every executable, the largest first, on all cores. `progress(done, total, what)`.

        `meet` waits until the other hosts have compiled too: what runs on all devices waits for them only so long.
        """
        jobs = list(self.lowerings())
        # On a CPU, XLA shares one program's compilation among all cores: more threads are no faster there.
        num_threads = 1 if jax.default_backend() == "cpu" else os.cpu_count() or 1
        with ThreadPoolExecutor(num_threads) as threads:
            # Lowered here, one after the other, as tracing holds the interpreter's lock; compiling does not.
            compiling = [(what, keep, threads.submit(lower().compile)) for what, keep, lower in jobs]
            for done, (what, keep, future) in enumerate(compiling, start=1):
                keep(future.result())
                if progress is not None:
                    progress(done, len(jobs), what)
        if meet is not None:
            meet()
        if self.swapper is not None:
            self.swapper.host.warm_up()

    def lowerings(self) -> list[Job]:
        """(name, where to keep the executable, how to lower it), for everything that serving runs."""

        def spec(tree: Any) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

        on = self._placement
        batch = None if on is None else on.batch

        def int32(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch)

        def jit(function: Callable[..., Any], out: Any, **options: Any) -> Any:
            return jax.jit(function, **options) if on is None else jax.jit(function, out_shardings=out, **options)

        weights, pool, state = spec(self.model.weights), spec(self._pool), spec(self._state)
        width, dtype = self.model.config.hidden_size, self.model.dtype

        def lower_step(tokens: int) -> Any:
            out = None if on is None else (on.pool, batch, batch)
            step = jit(self._forward, out, static_argnames="tokens", donate_argnames="pool")
            return step.lower(weights, pool, state.last_tokens, int32(self._shape.length(tokens)), tokens=tokens)

        def lower_sample(n: int, variant: Variant) -> Any:
            hidden = jax.ShapeDtypeStruct((self.config.max_num_seqs, width), dtype, sharding=batch)
            draw = jit(self._draw, batch, static_argnames="variant", donate_argnames="state")
            words = mask_words(self.model.config.vocab_size)
            mask = jax.ShapeDtypeStruct((n, words), jnp.uint32, sharding=batch) if variant is Variant.MASKED else None
            return draw.lower(weights, hidden, state, int32(n, NUM_COLUMNS), mask, variant=variant)

        def lower_score(tokens: int) -> Any:
            hidden = jax.ShapeDtypeStruct((tokens, width), dtype, sharding=batch)
            return jit(self._score_tile, batch).lower(weights, hidden, int32(), int32(min(tokens, SCORE_TILE)))

        def lower_set_row() -> Any:
            bias = int32(3, BIAS_ENTRIES)
            return jit(set_row, batch, donate_argnums=0).lower(state, int32(), int32(self.config.max_model_len), bias)

        heads = HeadParts(self.layout, None if on is None else on.pool)

        def copy(pool: KVPool, ids: jax.Array) -> KVPool:
            return copy_blocks(pool, heads.layout, ids[0], ids[1], implementation=self.model.implementation)

        def lower_copy() -> Any:
            each = heads.on_each(copy, (heads.pool_spec, PartitionSpec()), heads.pool_spec)
            return jit(each, None if on is None else on.pool, donate_argnums=0).lower(pool, int32(2, COPIES_PER_CALL))

        jobs: list[Job] = []
        for tokens in reversed(self._token_buckets):
            jobs.append((f"step {tokens}", _keep(self._step, tokens), partial(lower_step, tokens)))
        for variant, buckets in self._sample_buckets.items():
            for n in reversed(buckets):
                what = f"sample {n} {variant}"
                jobs.append((what, _keep(self._sample, (n, variant)), partial(lower_sample, n, variant)))
        for tokens in reversed(self._token_buckets):
            jobs.append((f"score {tokens}", _keep(self._score, tokens), partial(lower_score, tokens)))
        jobs.append(("rows", lambda executable: setattr(self, "_set_row", executable), lower_set_row))
        jobs.append(("copy", lambda executable: setattr(self, "_copy", executable), lower_copy))
        if self.swapper is not None:
            jobs += self.swapper.lowerings()
        return jobs

    # One step.

    def submit(self, plan: StepPlan) -> None:
        """Dispatches the step without waiting for it, or for its swaps unless the plan says so."""
        if plan.moves or self.swapper is not None:
            self._move_blocks(plan)
        for setup in plan.rows:
            self._take_row(setup)
        self._builder.update_tables(plan.tables)
        if not plan.num_tokens:
            self._in_flight.append(_InFlight(plan, 0, None, None, (), {}))
            return
        batch = self._builder.build(plan)
        self._pool, hidden, drawing = self._step[batch.tokens](
            self.model.weights, self._pool, self._state.last_tokens, batch.packed
        )
        tokens, logprobs = self._draw_tokens(drawing, batch, plan.masks)
        scores = self._score_prompts(plan, batch, hidden)
        wanted: tuple[int | None, ...] = ()
        if logprobs is not None:
            wanted = tuple(self._rows.setup(row).params.logprobs for row in batch.sampling_rows.tolist())
        for array in jax.tree.leaves((tokens, logprobs, scores)):
            if isinstance(array, jax.Array):
                array.copy_to_host_async()
        self._in_flight.append(_InFlight(plan, len(batch.sampling_rows), tokens, logprobs, wanted, scores))

    def collect(self) -> StepResult:
        """Waits for the oldest submitted step, or for the next swap where it computes nothing."""
        step = self._in_flight.popleft()
        ids = tuple(np.asarray(step.tokens)[: step.num_drawn].tolist()) if step.tokens is not None else ()
        logprobs: dict[int, TokenLogprobs] = {}
        if step.logprobs is not None and any(count is not None for count in step.wanted):
            table = _HostLogprobs(step.logprobs)
            logprobs = {i: table.entry(i, count) for i, count in enumerate(step.wanted) if count is not None}
        prompt_logprobs = {}
        for index, (count, tiles) in step.scores.items():
            tables = [(_HostLogprobs(tile.logprobs), tile) for tile in tiles]
            prompt_logprobs[index] = tuple(
                table.entry(tile.skip + i, count) for table, tile in tables for i in range(tile.used)
            )
        outs_through, ins_through, failed = self._report_swaps(step.plan)
        return StepResult(step.plan.step_id, ids, logprobs, prompt_logprobs, outs_through, ins_through, failed)

    def follow(self, plan: StepPlan, swaps_over: tuple[int | None, int | None]) -> None:
        """Runs a plan of another host, whose last result told so much of swaps: out, in. Its tokens stay on the device.

        Waits for an earlier step where several are under way. Errors as Swapper.follow.
        """
        if self.swapper is not None:
            self.swapper.follow(plan.step_id, swaps_over)
        self.submit(plan)
        if len(self._in_flight) > FOLLOW_DEPTH:
            jax.block_until_ready(self._in_flight.popleft().tokens)

    def _report_swaps(self, plan: StepPlan) -> SwapReport:
        if self.swapper is None:
            return SwapReport(None, None, ())
        if plan.num_tokens:
            self.swapper.poll()
        else:
            self.swapper.wait_next()
        return self.swapper.report()

    def _move_blocks(self, plan: StepPlan) -> None:
        swapper, waits = self.swapper, plan.waits_for_swaps
        moves = split_moves(plan.moves)
        if swapper is None:
            assert len(moves[MoveKind.COPY]) == len(plan.moves), "a plan swaps, and num_host_blocks is 0"
            self._copy_blocks(moves[MoveKind.COPY])
            return
        swapper.poll()  # what has arrived is checked before the step, not behind it
        swapper.swap_out(plan.step_id, self._pool, moves[MoveKind.SWAP_OUT], waits)
        self._pool = swapper.land(self._pool, moves[MoveKind.LAND])
        self._copy_blocks(moves[MoveKind.COPY])
        swapper.swap_in(plan.step_id, moves[MoveKind.SWAP_IN], waits)
        swapper.end_submit()

    def _copy_blocks(self, moves: Sequence[BlockMove]) -> None:
        for start in range(0, len(moves), COPIES_PER_CALL):
            ids = np.full((2, COPIES_PER_CALL), self.config.num_blocks, np.int32)  # out of range: dropped
            for i, move in enumerate(moves[start : start + COPIES_PER_CALL]):
                ids[:, i] = move.src, move.dst
            self._pool = self._copy(self._pool, ids)

    def _take_row(self, setup: RowSetup) -> None:
        if self._rows.set(setup):
            row = np.asarray(setup.row, np.int32)
            self._state = self._set_row(self._state, row, self._rows.history(setup), self._rows.bias(setup))

    def _draw_tokens(
        self, hidden: jax.Array, batch: Batch, masks: tuple[Mask, ...]
    ) -> tuple[jax.Array | None, Logprobs | None]:
        rows = batch.sampling_rows
        if not len(rows):
            return None, None
        variant = Variant.MASKED if masks else self._rows.variant(rows)
        padded = bucket_of(self._sample_buckets[variant], len(rows))
        packed = self._rows.params(rows, batch.sampling_positions, padded)
        bits = self._rows.masks(rows, masks, padded) if masks else None
        draw = self._sample[padded, variant]
        tokens, self._state, logprobs = draw(self.model.weights, hidden, self._state, packed, bits)
        return tokens, logprobs

    def _score_prompts(self, plan: StepPlan, batch: Batch, hidden: jax.Array) -> dict[int, tuple[int, list[_Tile]]]:
        scores = {}
        for index, (chunk, first) in enumerate(zip(plan.chunks, batch.chunk_starts, strict=True)):
            setup = self._rows.setup(chunk.row)
            if setup.params.prompt_logprobs is not None:
                after = chunk.start + 1
                targets = setup.token_ids[: setup.num_prompt][after : after + len(chunk.token_ids)]
                scores[index] = (setup.params.prompt_logprobs, self._score_run(batch.tokens, hidden, first, targets))
        return scores

    def _score_run(self, tokens: int, hidden: jax.Array, first: int, targets: tuple[int, ...]) -> list[_Tile]:
        """Scores targets[i] as the token after token row first + i of hidden [tokens, width], tile by tile."""
        size = min(tokens, SCORE_TILE)
        tiles = []
        for offset in range(0, len(targets), size):
            part = targets[offset : offset + size]
            start = min(first + offset, tokens - size)  # the last tile of the array starts early to stay inside
            skip = first + offset - start
            padded = np.zeros(size, np.int32)
            padded[skip : skip + len(part)] = part
            logprobs = self._score[tokens](self.model.weights, hidden, np.asarray(start, np.int32), padded)
            tiles.append(_Tile(logprobs, skip, len(part)))
        return tiles


class _HostLogprobs:
    """One device table of log-probabilities, fetched."""

    def __init__(self, logprobs: Logprobs) -> None:
        self._table = Logprobs(*(np.asarray(part) for part in logprobs))  # type: ignore[arg-type]

    def entry(self, index: int, count: int) -> TokenLogprobs:
        """The entry with its `count` most likely tokens."""
        chosen, rank, ids, values = (part[index] for part in self._table)
        top = tuple(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
        return TokenLogprobs(float(chosen), int(rank), top)


def sample_buckets(limit: int, variant: Variant) -> tuple[int, ...]:
    """Padded numbers of draws up to limit. Fewer sizes where a draw takes long to compile: powers of four."""
    if variant is Variant.GREEDY:
        return token_buckets(limit)
    sizes = [1]
    while sizes[-1] < limit:
        sizes.append(min(4 * sizes[-1], limit))
    return tuple(sizes)


def _keep(table: dict[Any, Executable], key: Any) -> Callable[[Any], None]:
    def keep(executable: Any) -> None:
        table[key] = executable

    return keep


def _lay_out(make: Callable[[], tuple[Any, Any]], shardings: tuple[Any, Any], only_shapes: bool) -> tuple[Any, Any]:
    """The two that `make` returns, each with its sharding if there is one, or their shapes."""
    if not only_shapes:
        made: tuple[Any, Any] = make() if shardings[0] is None else jax.jit(make, out_shardings=shardings)()
        return made
    first, second = (
        jax.tree.map(lambda x, on=on: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), shapes)
        for shapes, on in zip(jax.eval_shape(make), shardings, strict=True)
    )
    return first, second
