"""Tools and schemas that a client sends, checked and in the chat form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxcept.scheduler.params import StructuredOutput
from jaxcept_serve.wire import as_object, as_text, bad, shown, to_json

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


@dataclass(frozen=True, slots=True)
class ToolLimits:
    """How many tools a request may have, and how large their schemas may be together, in bytes."""

    max_tools: int
    max_schema_bytes: int

    def check(self, tools: Sequence[Any], path: str) -> None:
        """Raises ServiceError 400 for too many tools, or too large ones."""
        if len(tools) > self.max_tools:
            raise bad(path, f"expected at most {self.max_tools} tools, got {len(tools)}")
        if len(to_json(tools)) > self.max_schema_bytes:
            raise bad(path, f"expected at most {self.max_schema_bytes} bytes of tools")

    @staticmethod
    def check_names(tools: Sequence[Mapping[str, Any]], path: str) -> None:
        """Raises ServiceError 400 for a name that two tools (in the chat form) have."""
        seen: dict[str, int] = {}
        for i, tool in enumerate(tools):
            name = tool["function"]["name"]
            if name in seen:
                raise bad(f"{path}[{i}].name", f"tools[{seen[name]}] is named {shown(name)} too")
            seen[name] = i


def read_function(
    tool: Mapping[str, Any], path: str, *, schema_field: str = "parameters", is_schema_required: bool = False
) -> dict[str, Any]:
    """A function that the client runs, in the chat form, from an object with name, description and schema."""
    name = as_text(tool.get("name"), f"{path}.name")
    if not _NAME.fullmatch(name):
        raise bad(
            f"{path}.name", f"expected 1 to 128 of letters, digits, '_', '.', ':', '/' and '-', got {shown(name)}"
        )
    function: dict[str, Any] = {"name": name}
    if tool.get("description") is not None:
        function["description"] = as_text(tool["description"], f"{path}.description")
    schema = tool.get(schema_field)
    if schema is None and not is_schema_required:
        schema = {"type": "object", "properties": {}}
    kind = as_object(schema, f"{path}.{schema_field}").get("type", "object")
    if kind != "object":
        raise bad(f"{path}.{schema_field}.type", f"expected object, got {shown(kind)}")
    function["parameters"] = schema
    return {"type": "function", "function": function}


def constrained_to_schema(schema: Any, path: str, max_bytes: int) -> dict[str, Any]:
    """Fields of SamplingParams for text that is to match a JSON schema. Raises ServiceError 400."""
    if len(to_json(as_object(schema, path))) > max_bytes:
        raise bad(path, f"expected at most {max_bytes} bytes")
    return constrained(path, json_schema=schema)


def constrained_to_json(path: str) -> dict[str, Any]:
    """Fields of SamplingParams for text that is to be a JSON object. Raises ServiceError 400."""
    return constrained(path, json_object=True)


def constrained(path: str, **constraint: Any) -> dict[str, Any]:
    """Fields of SamplingParams for text that is to match a constraint, by a StructuredOutput's field. ServiceError 400.

    Whether it can be compiled is found out where the request is added.
    """
    try:
        return {"structured": StructuredOutput(**constraint)}
    except ValueError as error:
        raise bad(path, str(error)) from None
