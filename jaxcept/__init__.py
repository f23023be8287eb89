"""jaxcept: an LLM inference engine for generations that stop to use tools."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxcept.async_llm import AsyncLLM
    from jaxcept.llm import LLM
    from jaxcept.outputs import CompletionOutput, Delta, Interception, RequestOutput
    from jaxcept.scheduler.params import SamplingParams
    from jaxcept.session import InterceptOptions
    from jaxcept.tools.definition import Tool, tool

try:
    __version__ = version("jaxcept")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0"

# Loaded on first use, so that importing the scheduler loads neither JAX nor NumPy.
_HOMES = {
    "LLM": "jaxcept.llm",
    "AsyncLLM": "jaxcept.async_llm",
    "SamplingParams": "jaxcept.scheduler.params",
    "InterceptOptions": "jaxcept.session",
    "RequestOutput": "jaxcept.outputs",
    "CompletionOutput": "jaxcept.outputs",
    "Interception": "jaxcept.outputs",
    "Delta": "jaxcept.outputs",
    "Tool": "jaxcept.tools.definition",
    "tool": "jaxcept.tools.definition",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Delta",
    "InterceptOptions",
    "Interception",
    "RequestOutput",
    "SamplingParams",
    "Tool",
    "tool",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxcept' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
