"""The parts of an OpenAPI document that one tool needs: references resolved, schemas cut to a size a model can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_NODES = 2_000  # objects and lists of one tool's schema
MAX_DEPTH = 24
_KEYWORDS = {
    "type", "description", "enum", "const", "default", "format", "properties", "required", "items", "anyOf", "oneOf",
    "allOf", "additionalProperties", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "pattern",
}  # fmt: skip


class Document:
    """A parsed OpenAPI document. Only references into itself are followed."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self.root = root

    def resolve(self, node: Any) -> Any:
        """The node, or what its `$ref` points at. Raises ValueError if that leads nowhere, outside or in a circle."""
        for _ in range(MAX_DEPTH):
            if not isinstance(node, Mapping) or not isinstance(node.get("$ref"), str):
                return node
            node = self._follow(node["$ref"])
        raise ValueError("$ref goes in a circle")

    def schema(self, node: Any) -> dict[str, Any]:
        """A JSON schema without references. What lies too deep, or is one too many, allows anything."""
        return _Inliner(self).inline(node, 0)

    def _follow(self, reference: str) -> Any:
        if not reference.startswith("#/"):
            raise ValueError(f"$ref {reference[:200]!r}: only references into the document itself are followed")
        node: Any = self.root
        for part in reference[2:].split("/"):
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, Mapping) and key in node:
                node = node[key]
            elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
                node = node[int(key)]
            else:
                raise ValueError(f"$ref {reference[:200]!r} leads nowhere")
        return node


class _Inliner:
    def __init__(self, document: Document) -> None:
        self._document = document
        self._num_nodes = 0

    def inline(self, node: Any, depth: int) -> dict[str, Any]:
        self._num_nodes += 1
        if depth > MAX_DEPTH or self._num_nodes > MAX_NODES:
            return {}
        node = self._document.resolve(node)
        if not isinstance(node, Mapping):
            return {}
        made = {key: self._keyword(key, value, depth) for key, value in node.items() if key in _KEYWORDS}
        if node.get("nullable") is True and isinstance(made.get("type"), str):  # OpenAPI 3.0
            made["type"] = [made["type"], "null"]
        return made

    def _keyword(self, key: str, value: Any, depth: int) -> Any:
        if key == "properties" and isinstance(value, Mapping):
            return {name: self.inline(each, depth + 1) for name, each in value.items() if not _is_read_only(each)}
        if key in ("items", "additionalProperties") and isinstance(value, Mapping):
            return self.inline(value, depth + 1)
        if key in ("anyOf", "oneOf", "allOf") and isinstance(value, list):
            return [self.inline(each, depth + 1) for each in value]
        return value


def _is_read_only(schema: Any) -> bool:
    return isinstance(schema, Mapping) and schema.get("readOnly") is True
