"""JSON objects of a model folder, read field by field with errors that name the file and the field."""

from __future__ import annotations

import json
import math
from pathlib import Path

from jaxcept_models.errors import CheckpointError

Json = dict[str, object]


def read_json(path: Path) -> Json:
    """The object in a JSON file. Raises CheckpointError where it cannot be read or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


class Fields:
    """Typed access to one JSON object. Absent and null fields take the default; without one they raise."""

    def __init__(self, path: Path, values: Json, prefix: str = "") -> None:
        self.path = path
        self._values = values
        self._prefix = prefix

    @property
    def is_nested(self) -> bool:
        """Whether a field holds an object itself."""
        return any(isinstance(value, dict) for value in self._values.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that are there."""
        return tuple(self._values)

    def present(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(name) is not None

    def null(self, name: str) -> bool:
        """Whether the field is there and null, which for some fields differs from being absent."""
        return name in self._values and self._values[name] is None

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise self._wrong(name, "an integer")

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        raise self._wrong(name, "a finite number")

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if isinstance(value, bool):
            return value
        raise self._wrong(name, "true or false")

    def text(self, name: str, default: str) -> str:
        value = self._get(name, default)
        if isinstance(value, str):
            return value
        raise self._wrong(name, "a string")

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty where absent."""
        value = self._get(name, [])
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise self._wrong(name, "a list of strings")

    def integers(self, name: str) -> tuple[int, ...]:
        """An integer or a list of them; empty where absent."""
        value = self._get(name, [])
        items = value if isinstance(value, list) else [value]
        if all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            return tuple(items)
        raise self._wrong(name, "an integer or a list of integers")

    def section(self, name: str) -> Fields | None:
        """The object in a field; None where absent, null or empty."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return Fields(self.path, value, f"{self._prefix}{name}.") if value else None

    def text_map(self, name: str) -> dict[str, str]:
        """An object whose values are strings."""
        value = self._get(name, None)
        if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
            return dict(value)
        raise self._wrong(name, "an object of strings")

    def _get(self, name: str, default: object) -> object:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.path}: {self._prefix}{name} is missing")
        return value

    def _wrong(self, name: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self._prefix}{name} is {self._values[name]!r}, expected {expected}")
