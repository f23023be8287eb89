"""Orbax checkpoints: a model's arrays as this package lays them out, read straight into the shards of any mesh.

A checkpoint is a folder like a Hugging Face one, with the same config, tokenizer and chat template; in place of the
safetensors it has `weights/` (Orbax) and `jaxcept.json`, which names every array and file. It is written beside its
place and moved there once it is whole: whoever is killed in between leaves nothing that loads.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxcept_models.errors import CheckpointError
from jaxcept_models.fields import Fields, read_json
from jaxcept_models.loading import Leaf, Progress
from jaxcept_models.weight_map import Part, Rows, WeightMap

MANIFEST = "jaxcept.json"
WEIGHTS = "weights"
VERSION = 1
CHUNK_BYTES = 1 << 25  # what is read at least of an array: small enough that a shard reads little of its neighbours'
GROUP_BYTES = 1 << 30  # read or written at a time, so that host memory holds the model and this
DTYPES = ("float32", "bfloat16", "float16", "float64")
_OTHER_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5",
                  ".msgpack", ".onnx")  # fmt: skip
_TEMPLATES = "additional_chat_templates"


def is_checkpoint(folder: str | Path) -> bool:
    """Whether the folder is one of these, rather than a Hugging Face one."""
    return (Path(folder) / MANIFEST).is_file()


def write_checkpoint(folder: str | Path, arrays: Mapping[str, jax.Array], source: str | Path) -> None:
    """Writes arrays by path, and the files of `source` that are no weights.

    An older checkpoint at the same place stays whole until the new one is, and is then replaced. Raises
    ValueError where something else is there, RuntimeError where the arrays lie on several hosts.
    """
    if jax.process_count() > 1:
        raise RuntimeError("a checkpoint is written by one process; load the model in one, and write it there")
    place = Path(folder).absolute()
    if place.exists() and not (place.is_dir() and (is_checkpoint(place) or not any(place.iterdir()))):
        raise ValueError(f"{place}: is there and no checkpoint of jaxcept; choose another folder")
    partial, replaced = (place.with_name(f".{place.name}.{what}") for what in ("partial", "replaced"))
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    _copy_files(Path(source), partial)
    _save(partial / WEIGHTS, arrays)
    _write_manifest(partial, arrays)
    if place.exists():
        place.rename(replaced)
    partial.rename(place)
    _sync(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_arrays(
    folder: str | Path, leaves: Sequence[Leaf], sources: WeightMap, progress: Progress | None = None
) -> tuple[jax.Array, ...]:
    """The leaves' arrays, each device's part read by itself, whatever mesh they were written from.

    `sources` is the model's map for one device, as which arrays are stored. Shapes and files are checked before
    anything is read. Raises CheckpointError that names what is wrong.
    """
    place = Path(folder).absolute()
    stored = _read_manifest(place)
    for leaf in leaves:
        expected, found = _stored_shape(leaf, sources), stored.get(leaf.path)
        if found is None or found.shape != expected:
            what = "is missing" if found is None else f"has shape {found.shape}"
            raise CheckpointError(f"{place / WEIGHTS}: array {leaf.path} {what}; the config says {expected}")
    sizes = [int(np.prod(stored[leaf.path].shape)) * stored[leaf.path].dtype.itemsize for leaf in leaves]
    arrays: list[jax.Array] = []
    for group in _groups(sizes):
        wanted = {leaf.path: stored[leaf.path].update(sharding=_where(leaf, sources)) for leaf in leaves[group]}
        rows = _load(place / WEIGHTS, wanted, list(stored))
        for leaf in leaves[group]:
            arrays.append(leaf.finish(_arrange(rows.pop(leaf.path), leaf, sources)).block_until_ready())
        if progress is not None:
            progress(sum(sizes[: group.stop]), sum(sizes))
    return tuple(arrays)


def rows_for(parts: Sequence[Part], stored: Sequence[Part]) -> Rows | None:
    """For each row of an array made of `parts`, the row of the array made of `stored` that it is; None if all are the
    same. Both are made of the same tensors, of which `parts` may take some twice. Several matrices are always the same.
    """
    if any(part.entry is not None for part in parts):
        return None
    known = {part.tensor: part.rows for part in stored}
    pairs = [(part.rows, known[part.tensor]) for part in parts]
    rows = np.zeros(sum(len(place) for place, _ in pairs if place is not None), np.intp)
    for place, origin in pairs:
        if place is not None and origin is not None:
            rows[place] = origin
    return None if np.array_equal(rows, np.arange(len(rows))) else rows


def _stored_shape(leaf: Leaf, sources: WeightMap) -> tuple[int, ...]:
    rows = sum(len(part.rows) for part in sources[leaf.path] if part.rows is not None and part.entry is None)
    return (rows, *leaf.shape[1:]) if rows else leaf.shape


def _where(leaf: Leaf, sources: WeightMap) -> Sharding:
    """Where the rows are read to: where they belong, or, if they are yet to be arranged, to every device."""
    if leaf.sharding is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    if rows_for(leaf.parts, sources[leaf.path]) is None:
        return leaf.sharding
    assert isinstance(leaf.sharding, NamedSharding), "a model on several devices lies on a mesh"
    return NamedSharding(leaf.sharding.mesh, PartitionSpec())


def _arrange(rows: jax.Array, leaf: Leaf, sources: WeightMap) -> jax.Array:
    order = rows_for(leaf.parts, sources[leaf.path])
    if order is None:
        return rows
    arranged: jax.Array = jax.jit(lambda rows: rows[jnp.asarray(order)], out_shardings=leaf.sharding)(rows)
    return arranged


def _groups(sizes: Sequence[int]) -> Iterator[slice]:
    """Runs of arrays that are GROUP_BYTES together, or one array."""
    start = total = 0
    for i, size in enumerate(sizes):
        if total and total + size > GROUP_BYTES:
            yield slice(start, i)
            start, total = i, 0
        total += size
    if sizes:
        yield slice(start, len(sizes))


def _save(folder: Path, arrays: Mapping[str, jax.Array]) -> None:
    # Imported where it is used: it takes half a second, and most models are safetensors.
    from orbax.checkpoint import v1 as ocp  # noqa: PLC0415

    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.array.saving.use_compression = False  # weights do not compress, and reading is to run at the disk's speed
    context.memory.write_concurrent_bytes = max(GROUP_BYTES, *(array.nbytes for array in arrays.values()))
    with context:
        ocp.save(folder, dict(arrays))


def _load(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], names: Sequence[str]) -> dict[str, jax.Array]:
    from orbax.checkpoint import v1 as ocp  # noqa: PLC0415

    try:
        loaded = ocp.load(folder, {name: wanted.get(name, ocp.PLACEHOLDER) for name in names})
    except (ValueError, OSError) as error:  # FileNotFoundError, InvalidLayoutError, tensorstore's complaints
        raise CheckpointError(f"{folder}: Orbax cannot read it: {error}") from error
    return {name: loaded[name] for name in wanted}


def _copy_files(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        is_ours = file.name in (MANIFEST, WEIGHTS) or file.name.startswith(".")
        if file.is_file() and not is_ours and not file.name.endswith(_OTHER_WEIGHTS):
            shutil.copyfile(file, target / file.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES)


def _write_manifest(folder: Path, arrays: Mapping[str, jax.Array]) -> None:
    """Names everything, once it is on the disk."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        _sync(file)
    manifest = {
        "version": VERSION,
        "arrays": {path: {"shape": list(x.shape), "dtype": str(x.dtype)} for path, x in arrays.items()},
        "files": {str(file.relative_to(folder)): file.stat().st_size for file in files if WEIGHTS in file.parts},
    }
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for place in (path, *(folder for folder in folder.rglob("*") if folder.is_dir()), folder):
        _sync(place)


def _read_manifest(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays by path, once every file is known to be there whole."""
    path = folder / MANIFEST
    fields = Fields(path, read_json(path))
    if fields.integer("version") != VERSION:
        raise CheckpointError(f"{path}: version {fields.integer('version')}; this jaxcept reads {VERSION}")
    files, arrays = fields.section("files"), fields.section("arrays")
    if files is None or arrays is None:
        raise CheckpointError(f"{path}: names no files or no arrays")
    for name in files.names:
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != files.integer(name):
            what = "no such file" if size is None else f"has {size} bytes"
            raise CheckpointError(f"{file}: {what}; {MANIFEST} says {files.integer(name)} bytes")
    return {name: _described(arrays, name) for name in arrays.names}


def _described(arrays: Fields, name: str) -> jax.ShapeDtypeStruct:
    entry = arrays.section(name)
    dtype = entry.text("dtype", "") if entry is not None else ""
    if entry is None or dtype not in DTYPES:
        raise CheckpointError(f"{arrays.path}: array {name} holds {dtype!r}; supported are {', '.join(DTYPES)}")
    return jax.ShapeDtypeStruct(entry.integers("shape"), jnp.dtype(dtype))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
