"""How tool calls are written, as rules of a Lark grammar: what must follow once a model has begun a call."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxcept.tools import hermes, llama3_json, mistral

MAX_OPENING_CHARS = 1024  # that the beginning of a call may take
TURN = "\x02"  # stands before a turn's text, where an opening is looked for

_SPACE = r"_S: /[ \n\t]{1,8}/"


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """The calls of one format and some tools.

    `opening` finds the beginning of a call in a turn's text; what must come then are the rules of `rest`, by the tool
    that the opening names (its only group), or by "" where it names none. `turn` are the rules of a turn of calls,
    `turn_of_one` of one call, which begin at `calls`.
    """

    opening: re.Pattern[str]
    rest: Mapping[str, str]
    turn: str
    turn_of_one: str


def call_grammar(parser: str, schemas: Mapping[str, str], token_of: Callable[[str], int | None]) -> CallGrammar | None:
    """The grammar of a parser's format; None for a format that has none.

    schemas: by the tool's name, the JSON text of the schema of its arguments. `token_of` gives the id of a marker that
    is one token: only this token stands for it.
    """
    make = _FORMATS.get(parser)
    return make(schemas, lambda text: _marker(text, token_of)) if make is not None and schemas else None


def _hermes(schemas: Mapping[str, str], marker: Callable[[str], str]) -> CallGrammar:
    rules = _rules(schemas, "arguments")
    body = f"_S? call _S? {marker(hermes.CLOSE)}"
    one = f"{marker(hermes.OPEN)} {body}"
    return CallGrammar(
        re.compile(re.escape(hermes.OPEN)),
        {"": f"start: {body}\n{rules}"},
        f"calls: one (_S? one)*\none: {one}\n{rules}",
        f"calls: {one}\n{rules}",
    )


def _llama3_json(schemas: Mapping[str, str], marker: Callable[[str], str]) -> CallGrammar:
    """Only what has a tool's name and the key of its arguments is certainly a call: JSON may be the answer."""
    rules = _rules(schemas, "parameters")
    names = "|".join(re.escape(json.dumps(name)) for name in schemas)
    begin = rf"(?:{TURN}|{re.escape(llama3_json.TAG)}|;)\s*"
    opening = re.compile(rf'{begin}\{{\s*"name"\s*:\s*({names})\s*,\s*"(?:parameters|arguments)"\s*:')
    rest = {
        json.dumps(name): f'start: _S? args _S? "}}"\nargs: %json {schema}\n{_SPACE}'
        for name, schema in schemas.items()
    }
    return CallGrammar(opening, rest, f'calls: call (_S? ";" _S? call)*\n{rules}', f"calls: call\n{rules}")


def _mistral(schemas: Mapping[str, str], marker: Callable[[str], str]) -> CallGrammar:
    rules = _rules(schemas, "arguments")
    named = " | ".join(f"{_literal(name)} {marker('[ARGS]')}? args{i}" for i, name in enumerate(schemas))
    many = f'"[" _S? call (_S? "," _S? call)* _S? "]" | {named}'
    single = f'"[" _S? call _S? "]" | {named}'
    start = marker(mistral.MARKER)
    return CallGrammar(
        re.compile(re.escape(mistral.MARKER)),
        {"": f"start: _S? body\nbody: {many}\n{rules}"},
        f"calls: {start} _S? body\nbody: {many}\n{rules}",
        f"calls: {start} _S? body\nbody: {single}\n{rules}",
    )


_FORMATS: dict[str, Callable[[Mapping[str, str], Callable[[str], str]], CallGrammar]] = {
    "hermes": _hermes,
    "llama3_json": _llama3_json,
    "mistral": _mistral,
}


def _rules(schemas: Mapping[str, str], key: str) -> str:
    """`call`: an object of a tool's name and its arguments; `args<i>`: the arguments of the i-th tool."""
    each = [
        f'"{{" _S? "\\"name\\"" _S? ":" _S? {_literal(json.dumps(name))} _S? "," _S? "\\"{key}\\"" _S? ":" _S?'
        f' args{i} _S? "}}"'
        for i, name in enumerate(schemas)
    ]
    arguments = [f"args{i}: %json {schema}" for i, schema in enumerate(schemas.values())]
    return "\n".join(["call: " + "\n    | ".join(each), *arguments, _SPACE])


def _marker(text: str, token_of: Callable[[str], int | None]) -> str:
    token_id = token_of(text)
    return _literal(text) if token_id is None else f"<[{token_id}]>"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
