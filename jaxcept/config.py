"""Everything that one engine is built from, and what is chosen where the user is silent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import jaxcept_models
from jaxcept.scheduler.durations import ESTIMATORS
from jaxcept.scheduler.orders import ORDERS
from jaxcept.scheduler.policies.catalog import POLICIES
from jaxcept.scheduler.speculation import SpeculationConfig

GIB = 1 << 30
CACHE_BYTES = 8 * GIB  # of compiled programs: the oldest are forgotten
IMPLEMENTATIONS = ("auto", "xla", "native", "pallas")
KV_CACHE_DTYPES = ("auto", "int8")
_SPECULATION = {  # vLLM's names, and ours
    "num_speculative_tokens": "max_tokens",
    "prompt_lookup_max": "longest",
    "prompt_lookup_min": "shortest",
}


@dataclass(frozen=True, slots=True)
class Hosts:
    """One engine on several machines, or processes: this is number `host_id` of `num_hosts`.

    `coordinator` is HOST:PORT of number 0, as the others reach it; the port after it is used as well. All have
    `timeout_s` to come together.
    """

    coordinator: str
    num_hosts: int
    host_id: int
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65535:
            raise ValueError(f"--coordinator {self.coordinator}: expected HOST:PORT of host 0, a port below 65535")
        if self.num_hosts < 2:
            raise ValueError(f"--num-hosts {self.num_hosts}: expected 2 or more")
        if not 0 <= self.host_id < self.num_hosts:
            raise ValueError(f"--host-id {self.host_id}: expected 0 to {self.num_hosts - 1}")

    @property
    def plan_address(self) -> tuple[str, int]:
        """Where host 0 hands out plans."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port) + 1


def read_speculation(value: Mapping[str, Any] | str | None) -> SpeculationConfig | None:
    """Whether and how an engine guesses tokens. ValueError, naming what is wrong, for what is not understood."""
    if value is None:
        return None
    try:
        given = json.loads(value) if isinstance(value, str) else dict(value)
    except (ValueError, TypeError):
        given = None
    if not isinstance(given, dict):
        raise ValueError(f'speculative_config={value!r}: expected JSON such as {{"method": "ngram"}}')
    if given.pop("method", None) != "ngram":
        raise ValueError(f"speculative_config={value!r}: expected method 'ngram', the only one there is")
    unknown = sorted(set(given) - set(_SPECULATION))
    if unknown:
        raise ValueError(f"speculative_config: {', '.join(unknown)}: expected only {', '.join(_SPECULATION)}")
    try:
        return SpeculationConfig(**{_SPECULATION[name]: number for name, number in given.items()})
    except ValueError as error:
        raise ValueError(f"speculative_config={value!r}: {error}") from None


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of one engine. None means: chosen from the model and the device.

    model: a Hugging Face folder; None is the small model that jaxcept ships. kv_cache_dtype: "auto" is the dtype that
    the model computes in; "int8" holds and moves keys and values in eight bits, a scale for each token and head:
    half of bfloat16's bytes, a quarter of float32's. max_model_len: tokens of the longest
    sequence, prompt, completion and returned tokens together. num_blocks: size of the KV pool; None takes
    memory_utilization of a GPU's memory, or a share of a CPU's. implementation: "auto", "xla", "native" (the CPU's own
    kernels) or "pallas" (a GPU's; a CPU interprets them, for tests). tool_call_parser: "auto" reads it off the chat
    template. reasoning_parser: how thoughts are told apart from speech: "auto" reads it off the chat template, "none"
    takes them for speech, "qwen3" and "deepseek_r1" are <think>…</think>, which the latter leaves out at the beginning.
    compilation_cache: folder of XLA's persistent cache; "" is none. intercept_policy: where contexts wait for
    their tools. host_pool_gb: GiB of pinned host memory where contexts may wait; None is 4 on a GPU and as much as the
    KV pool on a CPU, as far as the policy uses it. queue_order: who is served first. return_head_start_s: what a
    tool's return is ahead of newcomers at most, seconds; None is the policy's (300 for min-waste). speculative_config:
    guesses of the next tokens that a step verifies all at once, None for none; a mapping or JSON with vLLM's names:
    method "ngram", num_speculative_tokens (8), prompt_lookup_max (4), prompt_lookup_min (2). duration_estimator:
    how long a tool will still take. cost_model: a file of `jaxcept profile`; without one the engine measures itself
    once, for some seconds, and remembers. tensor_parallel_size: devices that share every layer, and the KV pool by its
    heads. data_parallel_size: groups of as many devices that share the tokens of every step; each has the whole pool,
    so that this shortens steps and makes room for no more contexts. hosts: where these devices belong to several
    machines.
    """

    model: str | Path | None = None
    tokenizer: str | Path | None = None
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    load_format: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    intercept_policy: str = "min-waste"
    host_pool_gb: float | None = None
    queue_order: str = "fcfs"
    return_head_start_s: float | None = None
    speculative_config: Mapping[str, Any] | str | None = None
    duration_estimator: str = "survival"
    cost_model: str | Path | None = None
    chat_template: str | None = None
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    implementation: str = "auto"
    compilation_cache: str | Path | None = None
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    hosts: Hosts | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("intercept_policy", POLICIES),
            ("queue_order", ORDERS),
            ("duration_estimator", ESTIMATORS),
            ("implementation", IMPLEMENTATIONS),
            ("kv_cache_dtype", KV_CACHE_DTYPES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}")
        if self.host_pool_gb is not None and not 0 <= self.host_pool_gb < math.inf:
            raise ValueError(f"host_pool_gb={self.host_pool_gb}: expected GiB of host memory, 0 or more")
        if self.return_head_start_s is not None and not self.return_head_start_s >= 0:
            raise ValueError(f"return_head_start_s={self.return_head_start_s}: expected seconds, 0 or more")
        read_speculation(self.speculative_config)
        if not 0 < self.memory_utilization <= 1:
            raise ValueError(f"memory_utilization={self.memory_utilization}: expected above 0, at most 1")
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more, or None")
        for name in ("tensor_parallel_size", "data_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
        if self.num_devices > 1 and self.implementation == "native":
            raise ValueError("implementation='native' computes on one device; expected 'auto' or 'xla' on several")
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size}: expected 1 or more")

    @property
    def num_devices(self) -> int:
        """Devices of one engine."""
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def model_name(self) -> str:
        """What tables call the model."""
        return "shipped" if self.model is None else Path(self.model).name

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


def default_host_pool_bytes(pool_bytes: int) -> int:
    """Pinned host memory where the user is silent."""
    return pool_bytes if on_cpu() else 4 * GIB


def cache_folder() -> Path:
    """Where jaxcept keeps what it can find out again."""
    return Path.home() / ".cache" / "jaxcept"


def use_compilation_cache(folder: str | Path | None) -> None:
    """Points XLA's persistent cache at `folder`, by default one under the user's cache."""
    if folder == "":
        return
    path = Path(folder) if folder is not None else cache_folder() / "programs"
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    # With a bound JAX takes a lock for each file; without, one engine may read what another has half written.
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
