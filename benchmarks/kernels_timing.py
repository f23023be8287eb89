"""Times on a device that works behind the host's back, and the ceilings that times are held against.

A call is chained to itself inside one executable, so that launches follow each other on the device; several executions
are queued and waited for once. What is left of the host's dispatch is one part in a chain's length.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.kernels_cases import Preset
from benchmarks.kernels_report import WRONG, reason

CHAIN = 16  # calls in one executable
LONG_S = 0.25  # a chain that would take longer is not run: single calls are long enough to time
CACHE_BYTES = 64 << 20  # no device of interest has a larger last-level cache

# (state, how many calls went before, operands) → state of the same shapes
Step = Callable[[Any, jax.Array, Any], Any]
Executable = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Deadline:
    """A time to be finished by."""

    at_s: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """So many seconds from here on."""
        return cls(time.perf_counter() + seconds)

    @property
    def left_s(self) -> float:
        """Seconds left, negative once it is over."""
        return self.at_s - time.perf_counter()

    def part(self, of: int) -> Deadline:
        """An equal part of what is left, where `of` parts are to come."""
        return Deadline.after(self.left_s / of)


class Contender(NamedTuple):
    """One implementation of a call, compiled: `once` leaves its operands alone, `chain` takes its state over."""

    once: Executable  # (state, index, operands) → state
    chain: Executable | None  # ((index, state), operands) → (index, state); None where it is checked alone


class Chain(Enum):
    """How calls follow each other in one executable."""

    LAYERS = auto()  # written out as a model's layers: what calls have in common is computed once
    FIXED = auto()  # so too, and each execution begins at index 0: what depends on the index is known to the compiler
    LOOP = auto()  # compiles fast, computes all anew for each call; for results that the next call does not use, too


def repeat(step: Step, count: int, chain: Chain = Chain.LAYERS) -> Executable:
    """`count` calls, each on what the last one returned; the index goes on from execution to execution."""
    one = jax.jit(step)

    def body(_: Any, carry: tuple[jax.Array, Any], operands: Any) -> tuple[jax.Array, Any]:
        index, state = carry
        return index + jnp.int32(1), one(state, index, operands)

    def run(carry: tuple[jax.Array, Any], operands: Any) -> tuple[jax.Array, Any]:
        if chain is Chain.LOOP:
            last: tuple[jax.Array, Any] = jax.lax.fori_loop(0, count, partial(body, operands=operands), carry)
            return last
        index, state = carry
        for place in range(count):
            at = jnp.int32(place) if chain is Chain.FIXED else index + jnp.int32(place)
            state = one(state, at, operands)
        return index + jnp.int32(count), state

    return run


def compile_all(
    steps: Mapping[str, tuple[Step, Any, Any]],  # name → step, state, operands (or their shapes)
    chains: Mapping[str, Chain] | None = None,  # of those that are not LAYERS
    is_timed: bool = True,
) -> dict[str, Contender | Exception]:
    """Every step compiled once and, if it will be timed, chained; on all cores. What does not compile gives why."""
    found: dict[str, Contender | Exception] = {}
    with ThreadPoolExecutor() as threads:
        jobs = {}
        for name, (step, state, operands) in steps.items():
            index = jax.ShapeDtypeStruct((), jnp.int32)
            try:
                lowered = [jax.jit(step).lower(state, index, operands)]
                if is_timed:
                    calls = repeat(step, CHAIN, (chains or {}).get(name, Chain.LAYERS))
                    lowered.append(jax.jit(calls, donate_argnums=0).lower((index, state), operands))
            except Exception as error:  # whatever a kernel's own checks raise; it is told in the table
                found[name] = error
                continue
            jobs[name] = [threads.submit(each.compile) for each in lowered]
        for name, job in jobs.items():
            try:
                executables = [future.result() for future in job]
                found[name] = Contender(executables[0], executables[1] if is_timed else None)
            except Exception as error:  # compilers raise errors of their own kinds
                found[name] = error
    return found


class Stopwatch:
    """Times executions of one contender; the state goes from hand to hand, so that a large one exists once."""

    def __init__(self, contender: Contender, operands: Any, long_s: float = LONG_S) -> None:
        """`long_s` infinite: chained at any length, for calls that work in place only where their state is donated."""
        self.contender, self.operands, self.long_s = contender, operands, long_s
        self.single_s = math.inf  # seconds of one call, with its dispatch
        self.calls = 1  # executions of a round

    def settle(self, state: Any, round_s: float) -> Any:
        """Sees how many executions a round takes; a chain's first warms it up, as the check did `once`. The state."""
        zero = jnp.int32(0)
        self.single_s, _ = timed(partial(self.contender.once, state, zero, self.operands))
        if self.is_chained:
            chain = self._chain
            _, carry = timed(lambda: chain((zero, state), self.operands))
            spent, (_, state) = timed(lambda: chain(carry, self.operands))
            self.calls = max(1, math.ceil(round_s / spent))
        return state

    @property
    def is_chained(self) -> bool:
        """Whether calls are short enough to be chained."""
        return self.single_s * CHAIN <= self.long_s

    @property
    def _chain(self) -> Executable:
        assert self.contender.chain is not None, "what is checked alone is not timed"
        return self.contender.chain

    def round(self, state: Any) -> tuple[Any, float]:
        """The state, and seconds of a call."""
        if not self.is_chained:
            spent, _ = timed(partial(self.contender.once, state, jnp.int32(0), self.operands))
            return state, spent

        def queue() -> tuple[jax.Array, Any]:
            carry = (jnp.int32(0), state)
            for _ in range(self.calls):
                carry = self._chain(carry, self.operands)
            return carry

        spent, (_, state) = timed(queue)
        return state, spent / (self.calls * CHAIN)


class Judged(NamedTuple):
    """Implementations of one case after their check."""

    right: dict[str, Stopwatch]  # those worth a time
    errors: dict[str, float]  # of all that ran, but for the reference
    faults: dict[str, str]  # of those that did not run or are wrong


def judge(
    contenders: Mapping[str, Contender | Exception],  # the reference first
    state: Any,
    operands: Mapping[str, Any],  # of each
    index: Mapping[str, int],  # of each
    error_of: Callable[[Any, Any], jax.Array],  # (got, wanted) → 0 where they are equal
    allowed: float,
    long_s: float = LONG_S,
) -> Judged:
    """Runs each once and holds it against the reference."""
    judged = Judged({}, {}, {})
    want: Any = None
    for name, contender in contenders.items():
        try:
            if isinstance(contender, Exception):
                raise contender
            got = jax.block_until_ready(contender.once(state, jnp.int32(index[name]), operands[name]))
            if want is None:
                want = got
            else:
                judged.errors[name] = float(error_of(got, want))
            del got
            if not judged.errors.get(name, 0.0) <= allowed:
                raise ValueError(f"{WRONG}: {judged.errors[name]:.2g}")
            judged.right[name] = Stopwatch(contender, operands[name], long_s)
        except Exception as error:  # a kernel that the device refuses is a row of the table
            judged.faults[name] = reason(error)
    return judged


def compare(
    stopwatches: Mapping[str, Stopwatch], state: Any, rounds: int, round_s: float
) -> tuple[Any, dict[str, float]]:
    """The state, and median seconds of a call of each; they take turns, so that all see the same device.

    Those too long to be chained get a single round."""
    for stopwatch in stopwatches.values():
        state = stopwatch.settle(state, round_s)
    times: dict[str, list[float]] = {name: [] for name in stopwatches}
    for turn in range(rounds):
        for name, stopwatch in stopwatches.items():
            if turn and not stopwatch.is_chained:
                continue
            state, spent = stopwatch.round(state)
            times[name].append(spent)
    return state, {name: median(spent) for name, spent in times.items()}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the call's result is there, and the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def run_often(function: Callable[[Any], Any], x: Any, count: int) -> Any:
    """The last of so many results; the others are given up at once, as memory may hold few of them."""
    result = function(x)
    for _ in range(count - 1):
        result = function(x)
    return result


class Ceilings(NamedTuple):
    """What the device reaches on the simplest work, in this run."""

    copy: float  # bytes read and written a second, over a large array
    read: float  # bytes read a second, of a large array summed
    matrix: float  # floating-point operations a second, of a large square product in the cases' dtype
    dtype: str

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of each; what else the machine does can only lower them."""
        return Ceilings(
            max(self.copy, other.copy), max(self.read, other.read), max(self.matrix, other.matrix), self.dtype
        )


def measure_ceilings(preset: Preset) -> Ceilings:
    """Medians over rounds. The copy is the faster of one to elsewhere, and of a pass over an array in its place."""
    matrix = noise((preset.matrix, preset.matrix), preset.dtype)
    product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=x.dtype))
    matrix_s = _median_of(lambda count: run_often(product, matrix, count), preset)
    holder = [noise((preset.copy_bytes // 4096, 1024), jnp.float32)]
    size, total, copy = holder[0].nbytes, jax.jit(jnp.sum), jax.jit(jnp.copy)
    read_s = _median_of(lambda count: run_often(total, holder[0], count), preset)
    copy_s = _median_of(lambda count: run_often(copy, holder[0], count), preset)
    add = jax.jit(lambda x: x + jnp.float32(1), donate_argnums=0)

    def pass_over(count: int) -> jax.Array:
        for _ in range(count):
            holder[0] = add(holder[0])
        return holder[0]

    copy_s = min(copy_s, _median_of(pass_over, preset))
    return Ceilings(2 * size / copy_s, size / read_s, 2 * preset.matrix**3 / matrix_s, preset.dtype)


def _median_of(queue: Callable[[int], Any], preset: Preset) -> float:
    """Median seconds of one of the calls that `queue` is told to make."""
    timed(lambda: queue(1))
    spent, _ = timed(lambda: queue(1))
    calls = max(1, min(16, math.ceil(preset.round_s / spent)))
    return median(timed(lambda: queue(calls))[0] / calls for _ in range(preset.rounds))


def noise(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> jax.Array:
    """Numbers of [-1, 1) that look random and differ from place to place; made in one pass without other memory."""
    made: jax.Array = _noise(shape, jnp.dtype(dtype), seed)
    return made


@partial(jax.jit, static_argnums=(0, 1, 2))
def _noise(shape: tuple[int, ...], dtype: Any, seed: int) -> jax.Array:
    width = math.prod(shape[1:])
    rows = jax.lax.broadcasted_iota(jnp.uint32, (shape[0], width), 0)
    columns = jax.lax.broadcasted_iota(jnp.uint32, (shape[0], width), 1)
    # Two rounds of the finalizer of MurmurHash3, so that neither rows nor columns repeat.
    mixed = _mix(_mix(rows + jnp.uint32(1 + seed * 0x51ED27)) + columns)
    values: jax.Array = (mixed >> 8).astype(jnp.float32) * jnp.float32(2.0**-23) - jnp.float32(1)
    return values.astype(dtype).reshape(shape)


def _mix(words: jax.Array) -> jax.Array:
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    mixed: jax.Array = words ^ (words >> 16)
    return mixed


@jax.jit
def relative_error(got: Any, want: Any) -> jax.Array:
    """The largest difference over the largest expected number, over all arrays; NaN where either holds one."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    worst = [jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))) for a, b in pairs]
    largest = [jnp.max(jnp.abs(b.astype(jnp.float32))) for _, b in pairs]
    return jnp.max(jnp.stack(worst)) / jnp.maximum(jnp.max(jnp.stack(largest)), jnp.float32(1e-30))


def memory_limit(device: jax.Device) -> int | None:
    """Bytes that arrays may take, where the device tells."""
    stats = device.memory_stats()
    return int(stats["bytes_limit"]) if stats and "bytes_limit" in stats else None


def leaves_bytes(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def parts_of(deadline: Deadline, items: tuple[Any, ...]) -> Iterator[tuple[Any, Deadline]]:
    """Each item with its equal part of the time that is left when its turn comes."""
    for done, item in enumerate(items):
        yield item, deadline.part(len(items) - done)
