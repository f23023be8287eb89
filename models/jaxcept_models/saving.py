"""Models into checkpoints: one that is loaded, on whatever mesh, or one that lies in a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from jaxcept_kernels.attention import Implementation
from jaxcept_models.checkpoint import rows_for, write_checkpoint
from jaxcept_models.config import read_config
from jaxcept_models.loading import Progress, load_safetensors
from jaxcept_models.model import Model, model_leaves, outline_model, stored_parts, stored_rows


def save_checkpoint(model: Model, folder: str | Path, source: str | Path) -> None:
    """Writes a loaded model, in the dtype that it computes with, and the text files of the folder it came from.

    Takes as much memory again as the model. Raises ValueError where `folder` is there and no checkpoint.
    """
    sources = stored_parts(model.config)
    arrays = {}
    for leaf, rows in stored_rows(model):
        order = rows_for(sources[leaf.path], leaf.parts)
        arrays[leaf.path] = rows if order is None else rows[jnp.asarray(order)]
    write_checkpoint(folder, arrays, source)


def convert_checkpoint(source: str | Path, folder: str | Path, progress: Progress | None = None) -> None:
    """Writes a Hugging Face folder as a checkpoint, in the dtypes that it has. Host memory holds the model once.

    `progress(bytes read, bytes in all)`. Raises CheckpointError for what is wrong with `source`, ValueError where
    `folder` is there and no checkpoint.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        model = outline_model(read_config(source), jnp.dtype(jnp.float32), Implementation.XLA)
        leaves = [leaf._replace(finish=lambda rows: rows) for leaf in model_leaves(model)]
        arrays = load_safetensors(source, leaves, progress)
        write_checkpoint(folder, {leaf.path: x for leaf, x in zip(leaves, arrays, strict=True)}, source)
