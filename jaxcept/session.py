"""Text in, text out: encodes prompts, runs tools outside the engine, resumes sequences with what they returned.

One thread steps a session. Tools answer from threads of their own, and clients may resume or abort from any thread:
all of them leave a message in the inbox, which the next step reads first.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from jaxcept.answers import OpenTurn, call_record, probe_call, start_calls
from jaxcept.clock import Clock
from jaxcept.constraint import ToolChoice
from jaxcept.engine import Engine
from jaxcept.outputs import CompletionOutput, Delta, RequestOutput, Spent
from jaxcept.scheduler.events import Event, Finished, FinishReason, Intercepted, PromptLogprobs, Returned, Tokens
from jaxcept.scheduler.interception import Interception
from jaxcept.scheduler.lifecycle import MORE
from jaxcept.scheduler.params import InterceptParams, OnToolFailure, SamplingParams, ScriptedTrigger
from jaxcept.scheduler.plan import TokenLogprobs
from jaxcept.scheduler.request import Request
from jaxcept.scheduler.scheduler import StateError
from jaxcept.text.tokenizer import Tokenizer
from jaxcept.tools.calls import ToolCall, ToolResult
from jaxcept.tools.definition import Tool
from jaxcept.tools.toolbox import Toolbox
from jaxcept.transcript import Transcript
from jaxcept.watcher import CallTrigger, TextWatcher, ToolTurn

logger = logging.getLogger(__name__)

# Tools have timeouts of their own; the engine's comes later and is the way out should a tool's thread be lost.
TIMEOUT_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class InterceptOptions:
    """What stops a sequence for something outside, and the bounds of the stop.

    Tool calls stop it when the model ends its turn ("turn": several calls run side by side) or as soon as one call is
    complete ("call"). `strings` and `token_ids` stop it too; `handler` then gets the text generated since the last
    stop and returns the text to go on with; without one, somebody calls `resume`. `script` stops it by count, for
    traces. `timeout_s` bounds each stop, `max_interceptions` their number, `max_returned_tokens` what all of them may
    return (longer answers are cut); `on_failure`: "tell" the model what went wrong, or "fail" the completion.
    `expected_s` hints at how long a tool takes, by its name. With `hold_s`, a completion whose model ends its turn, or
    calls a tool that is answered outside, stays intercepted for so many seconds: a later request may go on with its
    context (`Session.add(follows=…)`). `tool_choice` says which tools may be called, and whether one must be.
    """

    trigger: CallTrigger = CallTrigger.TURN
    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    script: tuple[ScriptedTrigger, ...] = ()
    handler: Callable[[str], str] | None = None
    timeout_s: float = 120.0
    max_interceptions: int = 64
    max_returned_tokens: int | None = None
    on_failure: OnToolFailure = OnToolFailure.TELL
    hold_s: float | None = None
    expected_s: Mapping[str, float] = field(default_factory=dict)
    tool_choice: ToolChoice = field(default_factory=ToolChoice)

    def __post_init__(self) -> None:
        object.__setattr__(self, "trigger", CallTrigger(self.trigger))
        object.__setattr__(self, "on_failure", OnToolFailure(self.on_failure))


PROMPT_END = 8  # tokens of a prompt whose text shows whether it opens a thought
MakeWatcher = Callable[[SamplingParams, InterceptOptions, Toolbox | None], TextWatcher]


StepObserver = Callable[[Engine, Sequence[Event], float], object]  # called by the stepping thread after each step


@dataclass(slots=True)
class _Record:
    """The text side of one request."""

    request: Request
    prompt: str | None
    options: InterceptOptions
    toolbox: Toolbox | None
    transcripts: dict[int, Transcript]  # by seq_id, the unfinished ones
    outputs: list[CompletionOutput] = field(default_factory=list)
    turns: dict[int, OpenTurn] = field(default_factory=dict)  # by seq_id
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached: int = 0
    is_follower: bool = False  # it goes on with the context of an earlier request


class Session:
    """One engine and the text side of its requests."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        make_watcher: MakeWatcher,
        clock: Clock,
        seed: int = 0,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self._make_watcher = make_watcher
        self._clock = clock
        self._seed = seed
        self._num_added = 0
        self._records: dict[str, _Record] = {}
        self._by_seq: dict[int, _Record] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._deltas: list[Delta] = []  # since the last step
        self.observers: list[StepObserver] = []

    # From the stepping thread.

    def add(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        toolbox: Toolbox | None = None,
        options: InterceptOptions | None = None,
        cache_salt: str = "",
        add_special_tokens: bool = True,
        follows: str | None = None,
        is_open: bool = False,
        priority: int = 0,
    ) -> None:
        """Queues a request. ValueError on a prompt or parameters that cannot be served; nothing is queued then.

        `follows` names a request whose completion is held: where the prompt begins with all of its ids, the request
        goes on with its context; where it is gone, or does not fit, the request starts by itself. `is_open`: the prompt
        goes on; `extend` and `resume` bring the rest.
        """
        options = options if options is not None else InterceptOptions()
        text = prompt if isinstance(prompt, str) else None
        ids = self.tokenizer.encode(prompt, add_special_tokens) if isinstance(prompt, str) else prompt
        watchers: list[TextWatcher] = []

        def watch(_: int) -> TextWatcher:
            watchers.append(self._make_watcher(params, options, toolbox))
            watchers[-1].begin_after(lambda: self.tokenizer.decode(ids[-PROMPT_END:], skip_special_tokens=False))
            return watchers[-1]

        request = Request(
            request_id=request_id,
            prompt_ids=tuple(ids),
            params=params,
            intercept=self._intercept_params(options, toolbox is not None),
            eos_token_ids=tuple(self.tokenizer.stop_token_ids),
            cache_salt=cache_salt,
            seed_base=self._seed + self._num_added,
            watcher=watch,
            arrival=self._clock.now(),
            is_open=is_open,
            priority=priority,
        )
        followed = self._follow(follows, request) if follows is not None else None
        seq_ids = followed if followed is not None else self.engine.add(request)
        self._num_added += 1
        transcripts = {seq_id: Transcript(i, watchers[i]) for i, seq_id in enumerate(seq_ids)}
        record = _Record(request, text, options, toolbox, transcripts, is_follower=followed is not None)
        self._records[request_id] = record
        self._by_seq |= dict.fromkeys(seq_ids, record)

    def _follow(self, target: str, request: Request) -> tuple[int] | None:
        """Takes over the context of a request that is held; its seq_id, or None where that cannot be: then nobody waits
        for it any more."""
        try:
            seq_id, ended = self.engine.follow(target, request)
        except ValueError as error:
            logger.debug("request %r does not go on with %r: %s", request.request_id, target, error)
            self.engine.abort(target)
            return None
        self._deltas += self._on_finished(ended)
        return (seq_id,)

    def step(self) -> list[Delta]:
        """Reads the inbox, runs one step of the engine, starts the tools that were called."""
        while not self._inbox.empty():
            self._inbox.get_nowait()()
        events = self.engine.step()
        for observe in self.observers:
            observe(self.engine, events, self._clock.now())
        for event in events:
            self._handle(event, self._deltas)
        deltas, self._deltas = self._deltas, []
        return deltas

    def wait(self, timeout_s: float) -> None:
        """Waits for a message, at most `timeout_s`: for when nothing can be computed until a tool answers."""
        try:
            message = self._inbox.get(timeout=max(timeout_s, 0.0))
        except queue.Empty:
            return
        message()

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._records)

    def idle_s(self) -> float:
        """How long the stepping thread may wait: 0 where a step can compute, else until a tool's time is up."""
        if self.engine.has_work:
            return 0.0
        deadline = self.engine.next_deadline()
        return 1.0 if deadline is None else min(1.0, max(0.0, deadline - self._clock.now()))

    def abort_now(self, request_id: str) -> None:
        """Ends a request at once; its Finished event comes with the next step."""
        self.engine.abort(request_id)

    # From any thread.

    def check(self, params: SamplingParams, options: InterceptOptions | None, toolbox: Toolbox | None) -> None:
        """Compiles what binds the text of such a request, so that `add` need not. ValueError where that cannot be."""
        self._make_watcher(params, options if options is not None else InterceptOptions(), toolbox)

    def post(self, message: Callable[[], None]) -> None:
        """Leaves a message for the stepping thread, which calls it before its next step."""
        self._inbox.put(message)

    def abort(self, request_id: str) -> None:
        """Ends a request in whatever state it is; an unknown or finished one is left alone."""
        self.post(lambda: self.abort_now(request_id))

    def resume(
        self,
        request_id: str,
        text: str | None = None,
        token_ids: Sequence[int] | None = None,
        *,
        index: int = 0,
        interception: int | None = None,
        more: bool = False,
        on_done: Callable[[Exception | None], object] | None = None,
    ) -> None:
        """Goes on with an intercepted completion: the text, or the token ids, are appended to what it has.

        With `more` they are only computed, and the completion is intercepted again for the rest. `interception`, where
        given, must be the one that is open. `on_done` gets None, or the StateError or ValueError that says why the
        sequence cannot go on so.
        """
        if (text is None) == (token_ids is None):
            raise ValueError("resume: expected either text or token_ids, and not both")
        if not isinstance(text, str | None) or not isinstance(token_ids, Sequence | None):
            raise ValueError(f"resume: text={text!r}, token_ids={token_ids!r}: expected a string, or a list of ids")

        def message() -> None:
            error: Exception | None = None
            try:
                ids = self._encode_text(text) if text is not None else list(token_ids or ())
                go_on = self.engine.extend if more else self.engine.resume
                go_on(self._seq_id(request_id, index), ids, interception)
            except Exception as caught:  # whatever was handed in: the steps of the others go on
                error = caught
            if on_done is not None:
                on_done(error)
            elif error is not None:
                logger.warning("resume of request %r: %s", request_id, error)

        self.post(message)

    # Events of the engine.

    def _handle(self, event: Event, deltas: list[Delta]) -> None:
        match event:
            case Tokens():
                for seq_id, token_id in zip(event.seq_ids, event.token_ids, strict=True):
                    deltas.append(self._on_token(seq_id, token_id, event.logprobs.get(seq_id)))
            case Intercepted():
                deltas.append(self._on_intercepted(event))
            case Returned():
                deltas += self._on_returned(event)
            case PromptLogprobs():
                self._records[event.request_id].prompt_logprobs = event.entries
            case Finished():
                deltas += self._on_finished(event)

    def _on_token(self, seq_id: int, token_id: int, logprobs: TokenLogprobs | None) -> Delta:
        record = self._by_seq[seq_id]
        transcript = record.transcripts[seq_id]
        text = transcript.generated(token_id, logprobs)
        entries = (logprobs,) if logprobs is not None else None
        return Delta(record.request.request_id, transcript.index, "generated", text, (token_id,), entries)

    def _on_intercepted(self, event: Intercepted) -> Delta:
        record = self._by_seq[event.seq_id]
        turn, seq_id, interception = event.payload, event.seq_id, event.interception
        if isinstance(turn, ToolTurn) and record.toolbox is not None:
            self._start_turn(record, seq_id, OpenTurn(interception, turn, record.toolbox, self.engine.room(seq_id)))
        elif record.options.handler is not None and event.tool != MORE:
            self._start_handler(record, record.options.handler, event)
        known = turn if isinstance(turn, ToolTurn) else None
        spent = _spent(record, event.num_cached, event.earlier)
        return Delta(event.request_id, event.index, "intercepted", trigger=event.tool, turn=known, spent=spent)

    def _start_turn(self, record: _Record, seq_id: int, opened: OpenTurn) -> None:
        record.turns[seq_id] = opened

        def done(i: int, result: ToolResult) -> None:
            """In the tool's thread, where encoding keeps nobody waiting."""
            self.post(lambda: self._on_result(record, seq_id, opened, result))
            if opened.take(i, result):
                answer = opened.encode(self.tokenizer)
                self.post(lambda: self._on_answers(record, seq_id, opened, answer))

        start_calls(opened.turn, opened.toolbox, record.options.timeout_s, done)

    def _start_handler(self, record: _Record, handler: Callable[[str], str], event: Intercepted) -> None:
        text = record.transcripts[event.seq_id].since_return
        toolbox = Toolbox([Tool("handler", "", {"type": "object", "properties": {}}, lambda: handler(text))])

        def done(result: ToolResult) -> None:
            ids = self._encode_text(result.text)
            self.post(lambda: self._answer(record, event.seq_id, event.interception, ids, result.is_error))
            toolbox.close()

        toolbox.submit(ToolCall("call00000", "handler", {}), done, record.options.timeout_s)

    def _on_result(self, record: _Record, seq_id: int, opened: OpenTurn, result: ToolResult) -> None:
        if record.turns.get(seq_id) is opened:  # else it timed out, or was aborted, before the tool answered
            place = (record.request.request_id, record.transcripts[seq_id].index)
            self._deltas.append(Delta(*place, "answered", call_id=result.call.id, call=call_record(result)))

    def _on_answers(self, record: _Record, seq_id: int, opened: OpenTurn, answer: list[int] | Exception) -> None:
        if record.turns.get(seq_id) is not opened:
            return
        record.transcripts[seq_id].calls[opened.interception] = opened.records()
        if isinstance(answer, Exception):
            is_known = isinstance(answer, ValueError)
            why = None if is_known else answer
            logger.warning("request %r: its tools' answer: %s", record.request.request_id, answer, exc_info=why)
            self.engine.end(seq_id, FinishReason.LENGTH if is_known else FinishReason.ERROR)
        else:
            self._answer(record, seq_id, opened.interception, answer, opened.has_failed)

    def _answer(self, record: _Record, seq_id: int, interception: int, ids: Sequence[int], is_error: bool) -> None:
        try:
            fitting = ids[: self.engine.room(seq_id, interception)]
            if is_error:
                self.engine.fail(seq_id, fitting, interception)
            else:
                self.engine.resume(seq_id, fitting, interception)
        except StateError as error:  # it ended while the tool was at work
            logger.debug("request %r: %s", record.request.request_id, error)

    def _on_returned(self, event: Returned) -> list[Delta]:
        record = self._by_seq[event.seq_id]
        record.turns.pop(event.seq_id, None)
        held_back, segment = record.transcripts[event.seq_id].returned()
        place = (event.request_id, event.index)
        deltas = [Delta(*place, "generated", held_back)] if held_back else []
        return [*deltas, Delta(*place, "returned", segment.text, segment.token_ids)]

    def _on_finished(self, event: Finished) -> list[Delta]:
        record = self._by_seq.pop(event.seq_id)
        record.turns.pop(event.seq_id, None)
        held_back, output = record.transcripts.pop(event.seq_id).finish(event)
        record.outputs.append(output)
        spent = _spent(record, event.num_cached, event.interceptions)
        record.num_cached = max(record.num_cached, spent.cached_tokens)
        request_output = None
        if not record.transcripts:
            del self._records[event.request_id]
            request_output = _request_output(record)
        return [
            Delta(
                event.request_id,
                event.index,
                "finished",
                held_back,
                finish_reason=event.reason.value,
                stop_reason=event.stop_reason,
                spent=spent,
                output=request_output,
            )
        ]

    def _seq_id(self, request_id: str, index: int) -> int:
        record = self._records.get(request_id)
        for seq_id, transcript in (record.transcripts if record is not None else {}).items():
            if transcript.index == index:
                return seq_id
        raise StateError(
            f"request {request_id!r}, completion {index}: unknown or finished; nothing waits for an answer"
        )

    def _encode_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, continues=True)

    def _intercept_params(self, options: InterceptOptions, has_tools: bool) -> InterceptParams:
        told = f"error: no answer within {options.timeout_s:g} s"
        if has_tools:
            ended = options.trigger is CallTrigger.TURN
            failure = self.tokenizer.encode_returned([probe_call()], [told], ended_turn=ended)
        else:
            failure = self._encode_text(f" {told}")
        return InterceptParams(
            token_ids=tuple(options.token_ids),
            script=tuple(options.script),
            timeout_s=options.timeout_s + (TIMEOUT_GRACE_S if has_tools or options.handler is not None else 0.0),
            max_interceptions=options.max_interceptions,
            max_returned_tokens=options.max_returned_tokens,
            on_failure=options.on_failure,
            failure_ids=tuple(failure),
            expected_s=options.expected_s,
        )


def _request_output(record: _Record) -> RequestOutput:
    return RequestOutput(
        request_id=record.request.request_id,
        prompt=record.prompt,
        prompt_token_ids=list(record.request.prompt_ids),
        outputs=sorted(record.outputs, key=lambda output: output.index),
        prompt_logprobs=[None, *record.prompt_logprobs] if record.prompt_logprobs is not None else None,
        num_cached_tokens=record.num_cached,
    )


def _spent(record: _Record, num_cached: int, interceptions: Sequence[Interception]) -> Spent:
    """What a sequence took; the first interception of one that goes on with a held context is that of the hold."""
    held = interceptions[0] if record.is_follower and interceptions else None
    if held is not None:
        num_cached = max(num_cached, held.num_computed - held.num_recomputed)
    kept = [max(0, each.context_tokens - each.num_recomputed - each.num_swapped) for each in interceptions]
    return Spent(
        cached_tokens=min(num_cached, len(record.request.prompt_ids) - 1),
        swapped_tokens=sum(each.num_swapped for each in interceptions),
        recomputed_tokens=sum(each.num_recomputed for each in interceptions),
        intercepted_s=sum(each.duration_s for each in interceptions),
        held_token_s=sum(tokens * each.duration_s for tokens, each in zip(kept, interceptions, strict=True)),
    )
