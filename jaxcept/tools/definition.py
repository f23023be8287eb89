"""Tools: what the model is told about a function, made from its signature and docstring."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

from jaxcept.tools.arguments import check_arguments
from jaxcept.tools.docstring import parse_docstring
from jaxcept.tools.schema import Convert, Schema, UnsupportedTypeError, type_schema

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_PLAIN_DEFAULTS = (str, int, float, bool)


@dataclass(frozen=True)
class Tool:
    """A tool as the model sees it, and the function that answers, where there is one in this process.

    `parameters` is a JSON schema of type object. `function` None means that somebody outside answers. `timeout_s`
    bounds one call, in seconds; None leaves it to the toolbox. `is_pure` says that equal arguments give equal answers
    and that a call changes nothing, so that results may be shared and kept. A Tool is called like its function.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any] | None = None
    timeout_s: float | None = None
    is_pure: bool = False
    converts: Mapping[str, Convert] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(
                f"tool name {str(self.name)[:80]!r}: expected 1 to 128 of letters, digits, '_', '.', ':', '/' and '-'"
            )
        if not isinstance(self.description, str):
            raise ValueError(f"tool {self.name!r}: description={self.description!r}: expected a string")
        if not isinstance(self.parameters, Mapping) or self.parameters.get("type", "object") != "object":
            raise ValueError(f"tool {self.name!r}: parameters: expected a JSON schema of type object")
        properties = self.parameters.get("properties", {})
        if not isinstance(properties, Mapping):
            raise ValueError(f"tool {self.name!r}: parameters.properties: expected an object")
        required = self.parameters.get("required", ())
        if not isinstance(required, list | tuple) or not all(isinstance(name, str) for name in required):
            raise ValueError(f"tool {self.name!r}: parameters.required: expected a list of names")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(f"tool {self.name!r}: timeout_s={self.timeout_s!r}: expected seconds above 0, or None")

    @property
    def is_async(self) -> bool:
        """Whether the function is a coroutine function."""
        call = getattr(self.function, "__call__", None)  # noqa: B004 (an object may have an async __call__)
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(call)

    @property
    def schema(self) -> Schema:
        """The tool in the OpenAI form, as chat templates and servers read it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns; for an async function, a coroutine."""
        if self.function is None:
            raise TypeError(f"tool {self.name!r} has no function here: somebody outside answers its calls")
        return self.function(*args, **kwargs)

    def bind(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """A call's JSON arguments as the function's keyword arguments. Raises ArgumentsError in words for the model."""
        checked = check_arguments(self.parameters, arguments)
        return {name: self.converts[name](value) if name in self.converts else value for name, value in checked.items()}

    @classmethod
    def from_schema(cls, schema: Mapping[str, Any]) -> Tool:
        """A tool that is answered elsewhere, from the OpenAI form or from its inner `function` object alone."""
        function = schema.get("function", schema) if isinstance(schema, Mapping) else None
        if not isinstance(function, Mapping) or schema.get("type", "function") not in ("function", "object"):
            raise ValueError('a tool as a dict: expected {"type": "function", "function": {"name", "parameters"}}')
        if "name" not in function:
            raise ValueError("a tool as a dict: function.name is missing")
        parameters = function.get("parameters")
        return cls(
            name=function["name"],
            description=function.get("description") or "",
            parameters={"type": "object", "properties": {}} if parameters is None else parameters,
        )


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(
    *, name: str | None = None, description: str | None = None, timeout_s: float | None = None, pure: bool = False
) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    timeout_s: float | None = None,
    pure: bool = False,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a Tool of a typed function: `@tool`, or `@tool(name=…, description=…, timeout_s=…, pure=…)`.

    The schema comes from the type hints, the texts from the docstring (`Args:` sections or `:param x:` fields), what is
    required from the defaults. Raises TypeError, naming function and parameter, where a hint is missing or has no JSON
    schema, and for *args, **kwargs and positional-only parameters.
    """
    if function is None:
        return lambda decorated: _make_tool(decorated, name, description, timeout_s, pure)
    return _make_tool(function, name, description, timeout_s, pure)


def _make_tool(
    function: Callable[..., Any], name: str | None, description: str | None, timeout_s: float | None, is_pure: bool
) -> Tool:
    if not callable(function):
        raise TypeError(f"@tool: expected a function, got {function!r}")
    label = getattr(function, "__name__", type(function).__name__)
    hints = _hints(function, label)
    text, described = parse_docstring(function)
    properties: dict[str, Schema] = {}
    required: list[str] = []
    converts: dict[str, Convert] = {}
    for parameter in inspect.signature(function).parameters.values():
        where = f"tool {label!r}: parameter {parameter.name!r}"
        _refuse_kind(parameter, where)
        if parameter.name not in hints:
            raise TypeError(f"{where} has no type annotation; write {parameter.name}: str, or the type that it takes")
        try:
            schema, converts[parameter.name] = type_schema(hints[parameter.name])
        except UnsupportedTypeError as error:
            raise TypeError(f"{where}: {error}") from error
        except RecursionError as error:
            raise TypeError(f"{where}: its type refers to itself, which has no JSON schema here") from error
        if described.get(parameter.name):
            schema = {**schema, "description": described[parameter.name]}
        if parameter.default is inspect.Parameter.empty:
            required.append(parameter.name)
        elif type(parameter.default) in _PLAIN_DEFAULTS:
            schema = {**schema, "default": parameter.default}
        properties[parameter.name] = schema
    return Tool(
        name=name or label,
        description=text if description is None else description,
        parameters={"type": "object", "properties": properties, "required": required},
        function=function,
        timeout_s=timeout_s,
        is_pure=is_pure,
        converts=converts,
    )


def _hints(function: Callable[..., Any], label: str) -> dict[str, Any]:
    while isinstance(function, functools.partial):
        function = function.func
    target = function if inspect.isroutine(function) else type(function).__call__
    try:
        return typing.get_type_hints(target, include_extras=True)
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise TypeError(f"tool {label!r}: its type hints cannot be read: {error}") from error


def _refuse_kind(parameter: inspect.Parameter, where: str) -> None:
    if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        stars = "*" if parameter.kind is inspect.Parameter.VAR_POSITIONAL else "**"
        raise TypeError(f"{where} is {stars}{parameter.name}: a tool takes named parameters alone; name each of them")
    if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
        raise TypeError(f"{where} is positional-only: a model names its arguments; drop the '/'")
