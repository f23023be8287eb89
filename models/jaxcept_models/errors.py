"""The one error that a model folder can raise."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A model folder cannot be loaded. The message names the file, and the tensor with both shapes where it is one."""
