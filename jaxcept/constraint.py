"""What a sequence's text must be: its structured output, and the calls of its tools."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from re import Match

from jaxcept.scheduler.params import StructuredOutput
from jaxcept.text.grammar import GrammarCompiler, GrammarError, Matcher, quoted, regex_rule, schema_rule
from jaxcept.tools.call_grammar import MAX_OPENING_CHARS, TURN, CallGrammar, call_grammar
from jaxcept.tools.toolbox import Toolbox

logger = logging.getLogger(__name__)


class ToolMode(StrEnum):
    """Whether the model may call tools."""

    NONE = "none"  # what looks like a call is text
    AUTO = "auto"
    REQUIRED = "required"  # the first turn is calls


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which tools the model may call, and how. A name stands for that tool alone, and requires it in the first turn;
    without `parallel`, a turn holds one call at most."""

    mode: ToolMode = ToolMode.AUTO
    name: str | None = None
    parallel: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", ToolMode(self.mode))
        if self.name is not None and self.mode is ToolMode.NONE:
            raise ValueError(f"tool_choice: expected no name with mode {self.mode.value!r}, got {self.name!r}")

    @property
    def requires(self) -> bool:
        """Whether the first turn must be calls."""
        return self.mode is ToolMode.REQUIRED or self.name is not None


class Constraint:
    """One sequence's. A turn is bound from its beginning on, or from where a call begins in it, or not at all."""

    def __init__(
        self,
        first: Matcher | None,
        later: Matcher | None,
        opened: Callable[[Match[str]], Matcher] | None = None,
        grammar: CallGrammar | None = None,
        parallel: bool = True,
    ) -> None:
        """`first` binds the first turn, `later` those after a return; `opened` makes what binds a call of `grammar`."""
        self._later = later
        self._opened = opened
        self._grammar = grammar
        self._parallel = parallel
        self._matcher = first.copy() if first is not None else None
        self._in_call = False
        self._tail = TURN

    def mask(self) -> bytes | None:
        """Which tokens may come next; see Watcher.mask."""
        return self._matcher.mask() if self._matcher is not None else None

    def accept(self, token_id: int) -> bool:
        """Takes a token, or refuses it: then nothing changes."""
        if self._matcher is None:
            return True
        if not self._matcher.accept(token_id):
            return False
        if self._in_call and self._parallel and self._matcher.may_end:
            self._release()
        return True

    def masks_behind(self, token_ids: Sequence[int]) -> list[bytes | None]:
        """The masks behind each of these tokens, as far as they may come; a call's end is the last."""
        if self._matcher is None:
            return [None] * len(token_ids)
        matcher, masks = self._matcher.copy(), list[bytes | None]()
        for token_id in token_ids:
            if not matcher.accept(token_id):
                break
            is_released = self._in_call and self._parallel and matcher.may_end
            masks.append(None if is_released else matcher.mask())
            if is_released:
                break
        return masks

    def forced(self) -> list[int]:
        """The tokens of the text that must come next, if it must."""
        return self._matcher.forced() if self._matcher is not None else []

    def read(self, text: str) -> None:
        """The text that the accepted tokens add: a call may begin in it."""
        if self._matcher is not None or self._grammar is None or self._opened is None:
            return
        self._tail += text
        found = self._grammar.opening.search(self._tail)
        if found is None:
            self._tail = self._tail[-MAX_OPENING_CHARS:]
            return
        rest = self._tail[found.end() :]
        matcher = self._opened(found)
        self._tail = ""
        if not rest or matcher.accept_text(rest):
            self._matcher, self._in_call = matcher, True
            if self._parallel and matcher.may_end:
                self._release()
        else:  # one token held the opening and what cannot follow it: the parser reports the call
            logger.debug("a token with the beginning of a call goes on with %r", rest[:40])

    def begin_turn(self) -> None:
        """What follows answers a return."""
        self._matcher = self._later.copy() if self._later is not None else None
        self._in_call = False
        self._tail = TURN

    def _release(self) -> None:
        self._matcher, self._in_call, self._tail = None, False, ""


class ConstraintMaker:
    """Makes sequences' constraints, for one tokenizer and one format of tool calls. Thread-safe.

    Making one compiles what is not known yet: whoever checks a request does so in its own thread, and the engine's then
    finds it compiled.
    """

    def __init__(
        self, compiler: GrammarCompiler, parser: str | None, token_of: Callable[[str], int | None] = lambda _: None
    ) -> None:
        self._compiler = compiler
        self._parser = parser
        self._token_of = token_of

    def make(
        self, structured: StructuredOutput | None, choice: ToolChoice, toolbox: Toolbox | None
    ) -> Constraint | None:
        """A sequence's constraint, None where its text is free. ValueError, naming the field, where there is none."""
        if toolbox is None or not len(toolbox) or choice.mode is ToolMode.NONE:
            if choice.requires:
                raise ValueError("tool_choice: expected tools to choose from")
            matcher = self._alone(structured) if structured is not None else None
            return Constraint(matcher, matcher) if matcher is not None else None
        if choice.name is not None and choice.name not in toolbox:
            raise ValueError(f"tool_choice: there is no tool {choice.name[:80]!r}")
        try:
            grammar = self._calls(toolbox, choice)
            later = self._opening_matchers(grammar, structured, choice)
        except GrammarError as error:
            if choice.requires or structured is not None:
                raise
            logger.info("calls are not constrained: %s", error)
            return None
        if grammar is None and choice.requires:
            raise ValueError(f"tool_choice: expected 'auto', for the format {self._parser} has no grammar")
        if grammar is None:
            return None if structured is None else self.make(structured, ToolChoice(ToolMode.NONE), None)
        first = self._turn(grammar, choice, None) if choice.requires else later
        return Constraint(first, later, lambda found: self._rest(grammar, found), grammar, choice.parallel)

    def _calls(self, toolbox: Toolbox, choice: ToolChoice) -> CallGrammar | None:
        if self._parser is None:
            return None
        made = [each for each in toolbox if choice.name is None or each.name == choice.name]
        schemas = {each.name: self._compiler.tool_schema(each.schema["function"].get("parameters")) for each in made}
        return call_grammar(self._parser, schemas, self._token_of)

    def _opening_matchers(
        self, grammar: CallGrammar | None, structured: StructuredOutput | None, choice: ToolChoice
    ) -> Matcher | None:
        """Compiles what a call may need; returns what binds a turn from its beginning on, if anything does."""
        if grammar is None:
            return None
        if structured is not None:
            if structured.grammar is None:
                self._alone(structured)  # beside calls, an answer that no text can be would go unnoticed
            return self._turn(grammar, choice, structured)
        for rules in grammar.rest.values():
            self._compiler.lark(rules, "tools")
        return None

    def _turn(self, grammar: CallGrammar, choice: ToolChoice, structured: StructuredOutput | None) -> Matcher:
        calls = grammar.turn if choice.parallel else grammar.turn_of_one
        if structured is None:
            return self._compiler.lark(f"start: _S? calls\n{calls}", "tools")
        return self._compiler.lark(f"start: calls | answer\n{calls}\n{_answer_rule(structured)}", "structured")

    def _rest(self, grammar: CallGrammar, found: Match[str]) -> Matcher:
        name = found.group(1) if found.re.groups else ""
        return self._compiler.lark(grammar.rest[name], "tools")

    def _alone(self, structured: StructuredOutput) -> Matcher:
        compiler = self._compiler
        if structured.json_object:
            return compiler.json_object()
        if structured.regex is not None:
            return compiler.regex(structured.regex)
        if structured.grammar is not None:
            return compiler.lark(structured.grammar)
        if structured.choice is not None:
            return compiler.choice(structured.choice)
        assert structured.json_schema is not None, "checked by StructuredOutput"
        return compiler.json_schema(structured.json_schema)


def _answer_rule(structured: StructuredOutput) -> str:
    if structured.grammar is not None:
        raise GrammarError(
            "grammar: expected no tools beside it (tool_choice none); or give a JSON schema, a regex or a choice"
        )
    if structured.regex is not None:
        return f"answer: {regex_rule(structured.regex)}"
    if structured.choice is not None:
        return "answer: " + " | ".join(map(quoted, structured.choice))
    schema = {"type": "object"} if structured.json_object else structured.json_schema
    assert schema is not None, "checked by StructuredOutput"
    return f"answer: %json {schema_rule(schema, 'json_schema')}"
