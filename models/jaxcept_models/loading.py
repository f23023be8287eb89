"""Arrays of a model from a checkpoint or from a seed, one at a time: host memory holds the model and one array more."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxcept_models.safetensors_folder import SafetensorsFolder, Tensor
from jaxcept_models.weight_map import Part

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Finish = Callable[[jax.Array], jax.Array]

# Buffers that older checkpoints carry and that follow from the config, and the twin of a tied embedding.
_DERIVED = re.compile(r"(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|embed_positions)$|^lm_head\.weight$")


class Leaf(NamedTuple):
    """One array of a model: its shape as a checkpoint stores its rows, the tensors that fill it, and the last touch."""

    path: str
    shape: tuple[int, ...]  # [out, in] for a matrix, [entries, out, in] for several
    parts: tuple[Part, ...]
    finish: Finish  # from the rows as stored to the array as computed with
    sharding: Sharding | None = None  # of the rows as stored, where the array lies on several devices

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """The shape that a part must have in the checkpoint."""
        shape = self.shape if part.entry is None else self.shape[1:]
        return shape if part.rows is None else (len(part.rows), *shape[1:])


def load_safetensors(
    folder: str | Path, leaves: Sequence[Leaf], progress: Progress | None = None
) -> tuple[jax.Array, ...]:
    """The leaves' arrays from model.safetensors, or from the shards of its index.

    All shapes are checked before any tensor is read. Raises CheckpointError that names file, tensor, both shapes.
    """
    with SafetensorsFolder(folder) as tensors:
        dtypes = [_common_dtype(leaf, tensors) for leaf in leaves]
        used = {part.tensor for leaf in leaves for part in leaf.parts}
        unused = [name for name in tensors.names if name not in used and not _DERIVED.search(name)]
        if unused:
            logger.warning("%s: %d tensors are not used: %s", folder, len(unused), ", ".join(unused[:8]))
        sizes = [int(np.prod(leaf.shape)) * dtype.itemsize for leaf, dtype in zip(leaves, dtypes, strict=True)]
        arrays, done = [], 0
        for leaf, dtype, size in zip(leaves, dtypes, sizes, strict=True):
            arrays.append(_read(leaf, dtype, tensors))
            done += size
            if progress is not None:
                progress(done, sum(sizes))
    return tuple(arrays)


class Draw(NamedTuple):
    """The normal distribution of a random array's entries."""

    mean: float
    deviation: float


def random_arrays(
    leaves: Sequence[Leaf], draws: Sequence[Draw], seed: int, progress: Progress | None = None
) -> tuple[jax.Array, ...]:
    """The leaves' arrays drawn on the device from one seed, each from its own stream."""
    key = jax.random.key(seed)
    sizes = [4 * int(np.prod(leaf.shape)) for leaf in leaves]
    arrays = []
    for i, (leaf, draw) in enumerate(zip(leaves, draws, strict=True)):
        if draw.deviation == 0:
            rows = jnp.full(leaf.shape, draw.mean, jnp.float32)
        else:
            rows = _normal(jax.random.fold_in(key, i), leaf.shape, draw, leaf.sharding)
        arrays.append(leaf.finish(rows).block_until_ready())
        if progress is not None:
            progress(sum(sizes[: i + 1]), sum(sizes))
    return tuple(arrays)


@partial(jax.jit, static_argnames=("shape", "sharding"))
def _normal(key: jax.Array, shape: tuple[int, ...], draw: Draw, sharding: Sharding | None) -> jax.Array:
    drawn = jax.random.normal(key, shape, jnp.float32) * draw.deviation + draw.mean
    return drawn if sharding is None else jax.lax.with_sharding_constraint(drawn, sharding)


def _common_dtype(leaf: Leaf, tensors: SafetensorsFolder) -> np.dtype[Any]:
    """The stored dtype, or float32 where the parts of a fused array differ."""
    dtypes = {tensors.describe(part.tensor, leaf.part_shape(part)) for part in leaf.parts}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def _read(leaf: Leaf, dtype: np.dtype[Any], tensors: SafetensorsFolder) -> jax.Array:
    if leaf.sharding is None:
        stored = jax.device_put(_read_part(leaf, dtype, tensors, (slice(None),) * len(leaf.shape)))
    else:
        read = _once(partial(_read_part, leaf, dtype, tensors))
        stored = jax.make_array_from_callback(leaf.shape, leaf.sharding, read)
    # Waiting bounds what is alive at once: this array as stored, and as computed with.
    return leaf.finish(stored).block_until_ready()


def _read_part(leaf: Leaf, dtype: np.dtype[Any], tensors: SafetensorsFolder, index: tuple[slice, ...]) -> Tensor:
    """What the checkpoint holds of `index` of a leaf; nothing else of it is read."""
    bounds = [part.indices(size) for part, size in zip(index, leaf.shape, strict=True)]
    read = np.empty([stop - start for start, stop, _ in bounds], dtype)
    for part in leaf.parts:
        if part.entry is None:
            _read_rows(read, part, tensors, index, leaf.shape[0])
        elif bounds[0][0] <= part.entry < bounds[0][1]:
            _read_rows(read[part.entry - bounds[0][0]], part, tensors, index[1:], leaf.shape[1])
    return read


def _read_rows(target: Tensor, part: Part, tensors: SafetensorsFolder, index: tuple[slice, ...], num_rows: int) -> None:
    """Writes a part's share of `index`, of so many rows in all, to its place in `target`."""
    first, last, _ = index[0].indices(num_rows)
    places = part.rows if part.rows is not None else np.arange(num_rows)
    wanted = np.flatnonzero((places >= first) & (places < last))
    if len(wanted):
        for where, slab in tensors.slabs(part.tensor, slice(wanted[0], wanted[-1] + 1), index[1:]):
            here = places[where]
            is_wanted = (here >= first) & (here < last)
            target[here[is_wanted] - first] = slab[is_wanted]


def _once(read: Callable[[tuple[slice, ...]], Tensor]) -> Callable[[tuple[slice, ...] | None], Tensor]:
    """Reads parts that several devices have once."""
    known: dict[str, Tensor] = {}

    def get(index: tuple[slice, ...] | None) -> Tensor:
        assert index is not None, "an array without parts"
        key = repr(index)
        if key not in known:
            known[key] = read(index)
        return known[key]

    return get
