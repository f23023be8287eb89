"""What a model folder says about its text: the tokenizer, names of special tokens, stop ids, chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(ValueError):
    """A folder's tokenizer cannot be read; the message names the file."""


@dataclass(frozen=True, slots=True)
class TextFiles:
    """The parts of a model folder that concern text."""

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    tool_template: str | None = None


def read_text_files(folder: str | Path) -> TextFiles:
    """Read a Hugging Face folder. Raises TokenizerError, naming the file that is missing or wrong."""
    path = Path(folder)
    if not path.is_dir():
        raise TokenizerError(f"{path}: not a folder; expected one with tokenizer.json")
    config = _read_object(path / "tokenizer_config.json")
    special = _special_tokens(_read_object(path / "special_tokens_map.json")) | _special_tokens(config)
    templates = _chat_templates(path, config)
    chat = templates.get("default", next(iter(templates.values()), None))
    return TextFiles(_backend(path), special, _eos_token_ids(path), chat, templates.get("tool_use"))


def _backend(path: Path) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json"
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{file}: not a tokenizer: {error}") from error
    # Only folders in older formats need transformers, whose import takes seconds and may bring torch with it.
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        backend = getattr(AutoTokenizer.from_pretrained(str(path)), "backend_tokenizer", None)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(f"{path}: no tokenizer.json, and transformers reads no tokenizer: {error}") from error
    if not isinstance(backend, tokenizers.Tokenizer):
        raise TokenizerError(f"{path}: its tokenizer has no fast form; convert it to a tokenizer.json")
    return backend


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{file}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _special_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens; each is written as a string or as an object with its content."""
    named = {}
    for name in SPECIAL_NAMES:
        value = fields.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            named[name] = text
    return named


def _chat_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name: a file of its own comes before the configuration."""
    file = path / "chat_template.jinja"
    if file.is_file():
        found = {"default": file.read_text(encoding="utf-8")}
        for extra in sorted((path / "additional_chat_templates").glob("*.jinja")):
            found[extra.stem] = extra.read_text(encoding="utf-8")
        return found
    for given in (_read_object(path / "chat_template.json").get("chat_template"), config.get("chat_template")):
        if isinstance(given, str):
            return {"default": given}
        if isinstance(given, dict):
            return {str(name): str(source) for name, source in given.items()}
        if isinstance(given, list):
            return {str(entry["name"]): str(entry["template"]) for entry in given}
    return {}


def _eos_token_ids(path: Path) -> tuple[int, ...]:
    """Ids that end a generation, as the generation settings say, or else the model's."""
    for name in ("generation_config.json", "config.json"):
        file = path / name
        value = _read_object(file).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
            raise TokenizerError(f"{file}: eos_token_id={value!r}: expected an id or a list of ids")
        return tuple(ids)
    return ()
