"""Everything that one engine is built from, and what is chosen where the user is silent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax

import jaxcept_models

POLICIES = ("preserve", "discard")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of one engine. None means: chosen from the model and the device.

    model: a Hugging Face folder; None is the small model that jaxcept ships. max_model_len: tokens of the longest
    sequence, prompt, completion and returned tokens together. num_blocks: size of the KV pool; None takes
    memory_utilization of a GPU's memory, or a share of a CPU's. implementation: "auto", "xla" or "native" (the CPU's
    own kernels). tool_call_parser: "auto" reads it off the chat template. compilation_cache: folder of XLA's persistent
    cache; "" is none.
    """

    model: str | Path | None = None
    tokenizer: str | Path | None = None
    dtype: str = "auto"
    load_format: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    intercept_policy: str = "preserve"
    chat_template: str | None = None
    tool_call_parser: str = "auto"
    implementation: str = "auto"
    compilation_cache: str | Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.intercept_policy not in POLICIES:
            raise ValueError(f"intercept_policy={self.intercept_policy!r}: expected one of {', '.join(POLICIES)}")
        if not 0 < self.memory_utilization <= 1:
            raise ValueError(f"memory_utilization={self.memory_utilization}: expected above 0, at most 1")
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more, or None")
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size}: expected 1 or more")

    @property
    def folder(self) -> Path:
        """The model's folder; FileNotFoundError says what was looked for."""
        if self.model is None:
            return shipped_model()
        folder = Path(self.model)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"model={str(self.model)!r} is no folder: expected a Hugging Face model folder with config.json"
            )
        return folder


def shipped_model() -> Path:
    """The folder of the small model that comes with jaxcept."""
    return Path(next(iter(jaxcept_models.__path__))) / "shipped"


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def default_max_num_seqs() -> int:
    return 32 if on_cpu() else 256


def default_max_num_batched_tokens() -> int:
    return 512 if on_cpu() else 2048


def use_compilation_cache(folder: str | Path | None) -> None:
    """Points XLA's persistent cache at `folder`, by default one under the user's cache."""
    if folder == "":
        return
    path = Path(folder) if folder is not None else Path.home() / ".cache" / "jaxcept" / "xla"
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
