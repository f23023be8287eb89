"""The tensors of a Hugging Face folder: one safetensors file, or the shards that an index names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from jaxcept_models.errors import CheckpointError
from jaxcept_models.fields import Fields, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SLAB_BYTES = 1 << 26
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}

Tensor = npt.NDArray[Any]


class SafetensorsFolder:
    """Opens every file at once, so that a missing or truncated one is known before anything is read.

    Raises CheckpointError that names the file: none there, a shard that the index names and the folder lacks, a file
    that is truncated or no safetensors.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors, in the order of their names."""
        return tuple(sorted(self._file_of))

    def describe(self, name: str, expected: tuple[int, ...]) -> np.dtype[Any]:
        """The dtype of a tensor, once it is known to be there in that shape. Raises CheckpointError otherwise."""
        if name not in self._file_of:
            where = self._folder / (SINGLE if len(self._files) == 1 else INDEX)
            raise CheckpointError(f"{where}: tensor {name} is missing; expected with shape {expected}")
        part = self._slice(name)
        shape, dtype = tuple(part.get_shape()), part.get_dtype()
        if shape != expected:
            raise CheckpointError(f"{self._path(name)}: tensor {name} has shape {shape}, the config says {expected}")
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{self._path(name)}: tensor {name} holds {dtype}; supported are {', '.join(_DTYPES)}"
            )
        return _DTYPES[dtype]

    def slabs(self, name: str, rows: slice, rest: tuple[slice, ...]) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of a tensor, a few at a time: at most SLAB_BYTES of whole ones, or one row where that is more.

        `rest` cuts the other axes.
        """
        part = self._slice(name)
        shape = tuple(part.get_shape())
        row_bytes = _DTYPES[part.get_dtype()].itemsize * int(np.prod(shape[1:], dtype=np.int64))
        count = max(1, SLAB_BYTES // max(1, row_bytes))
        for start in range(rows.start, rows.stop, count):
            some = slice(start, min(start + count, rows.stop))
            try:
                yield some, part[(some, *rest)]
            except SafetensorError as error:
                raise CheckpointError(f"{self._path(name)}: tensor {name} of shape {shape}: {error}") from error

    def _open(self) -> None:
        single, index = self._folder / SINGLE, self._folder / INDEX
        if single.is_file():
            self._open_file(single)
            self._file_of = dict.fromkeys(self._files[SINGLE].keys(), SINGLE)
        elif index.is_file():
            self._open_shards(index)
        else:
            raise CheckpointError(f"{self._folder}: neither {SINGLE} nor {INDEX}; other formats need converting first")

    def _open_shards(self, index: Path) -> None:
        shard_of = Fields(index, read_json(index)).text_map("weight_map")
        for file in sorted(set(shard_of.values())):
            if Path(file).name != file:
                raise CheckpointError(f"{index}: names the shard {file!r}, expected a file of the same folder")
            if not (self._folder / file).is_file():
                count = sum(shard == file for shard in shard_of.values())
                raise CheckpointError(f"{self._folder / file}: no such file; {INDEX} places {count} tensors there")
            self._open_file(self._folder / file)
        held = {file: set(opened.keys()) for file, opened in self._files.items()}
        for name, file in shard_of.items():
            if name not in held[file]:
                raise CheckpointError(f"{self._folder / file}: tensor {name} is missing; {INDEX} places it there")
        self._file_of = shard_of

    def _open_file(self, path: Path) -> None:
        try:
            self._files[path.name] = self._stack.enter_context(safe_open(path, framework="np"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: truncated or no safetensors file ({path.stat().st_size} bytes): {error}"
            ) from error

    def _slice(self, name: str) -> Any:
        return self._files[self._file_of[name]].get_slice(name)

    def _path(self, name: str) -> Path:
        return self._folder / self._file_of[name]
