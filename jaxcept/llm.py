"""The composition root and the synchronous Python API."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxcept.build import build_session
from jaxcept.config import EngineConfig
from jaxcept.outputs import Delta, RequestOutput
from jaxcept.scheduler.params import SamplingParams
from jaxcept.session import InterceptOptions, Session
from jaxcept.tools.definition import Tool
from jaxcept.tools.toolbox import Toolbox

Prompt: TypeAlias = str | Sequence[int]
Message: TypeAlias = Mapping[str, Any]
Tools: TypeAlias = Sequence[Tool | Callable[..., Any]] | Toolbox


class LLM:
    """Generates from a model, tools included: a call stops its own sequence, runs, and the sequence goes on.

    `model` is a Hugging Face folder; by default the small model that comes with jaxcept. Further options are those of
    EngineConfig. One thread drives the engine at a time: calls from several threads wait for one another.

        llm = LLM()
        llm.chat([{"role": "user", "content": "What is 37 * 91?"}], tools=[calculator])[0].outputs[0].answer
    """

    def __init__(self, model: str | Path | None = None, *, progress: bool | None = None, **options: Any) -> None:
        self._progress = sys.stderr.isatty() if progress is None else progress
        self._lock = threading.RLock()
        self._count = 0
        self._arrived: dict[str, deque[Delta]] = {}  # by unfinished request; a job's requests share one
        with self._bar() as bar:
            task = bar.add_task("starting", total=None)
            self.session: Session = build_session(
                EngineConfig(model=model, **options),
                lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
            )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Tools | None = None,
        intercept: InterceptOptions | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts (strings, or lists of token ids), in order. One SamplingParams for all, or one for each.

        With `tools`, a string prompt is a user's message, rendered by the model's chat template, which is what shows
        the model its tools; without, it is completed as it stands. Raises ValueError on a prompt or a parameter that
        the engine cannot serve; then none of the prompts has run.
        """
        return self._run(self._prompt_job(prompts, params, tools, intercept))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Tools | None = None,
        intercept: InterceptOptions | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several side by side; messages and tools in the OpenAI format."""
        return self._run(self._chat_job(messages, params, tools, intercept))

    def generate_stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Tools | None = None,
        intercept: InterceptOptions | None = None,
    ) -> Iterator[Delta]:
        """As `generate`, yielding what each step adds. Delta.request_id is the prompt's index, as a string."""
        return self._stream(self._prompt_job(prompts, params, tools, intercept))

    def chat_stream(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Tools | None = None,
        intercept: InterceptOptions | None = None,
    ) -> Iterator[Delta]:
        """As `chat`, yielding what each step adds. Delta.request_id is the conversation's index, as a string."""
        return self._stream(self._chat_job(messages, params, tools, intercept))

    def get_metrics(self) -> dict[str, float]:
        """The engine's figures by name: tokens by cause, waste, swaps, and how far off step predictions are."""
        return self.session.engine.metrics()

    def _prompt_job(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        tools: Tools | None,
        intercept: InterceptOptions | None,
    ) -> _Job:
        many, toolbox = _as_prompts(prompts), as_toolbox(tools)
        if toolbox is not None and self.session.tokenizer.chat_template is not None:
            many = [self._encode([{"role": "user", "content": p}], toolbox) if isinstance(p, str) else p for p in many]
        return self._job(many, params, tools, toolbox, intercept)

    def _chat_job(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        tools: Tools | None,
        intercept: InterceptOptions | None,
    ) -> _Job:
        toolbox = as_toolbox(tools)
        prompts = [self._encode(each, toolbox) for each in _as_conversations(messages)]
        return self._job(prompts, params, tools, toolbox, intercept)

    def _encode(self, messages: Sequence[Message], toolbox: Toolbox | None) -> Prompt:
        return self.session.tokenizer.encode_chat(messages, toolbox.schemas() if toolbox else None)

    # Inside.

    def _bar(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, console=Console(stderr=True), transient=True, disable=not self._progress)

    def _run(self, job: _Job) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        with self._bar() as bar:
            task = bar.add_task("generating", total=job.num_completions)
            for delta in self._stream(job):
                if delta.kind == "finished":
                    bar.update(task, advance=1)
                if delta.output is not None:
                    outputs[delta.request_id] = replace(delta.output, request_id=delta.request_id)
        return [outputs[str(i)] for i in range(len(job.prompts))]

    def _stream(self, job: _Job) -> Iterator[Delta]:
        with self._lock, closing_own(job.toolbox, job.tools):
            arrived: deque[Delta] = deque()
            ids = self._add(job, arrived)
            index = {request_id: str(i) for i, request_id in enumerate(ids)}
            for delta in self._deltas(ids, arrived):
                yield replace(delta, request_id=index[delta.request_id])

    def _add(self, job: _Job, arrived: deque[Delta]) -> list[str]:
        """Queues a job's prompts, whose deltas will be in `arrived`; their request_ids."""
        ids: list[str] = []
        try:
            for prompt, params in zip(job.prompts, job.params, strict=True):
                request_id = f"llm-{self._count}"
                self._count += 1
                self.session.add(
                    prompt,
                    params,
                    request_id=request_id,
                    toolbox=job.toolbox,
                    options=job.intercept,
                )
                ids.append(request_id)
                self._arrived[request_id] = arrived
        except BaseException:
            self._abandon(ids)
            raise
        return ids

    def _deltas(self, ids: Sequence[str], arrived: deque[Delta]) -> Iterator[Delta]:
        """Steps until all of these have finished; leaving early aborts them."""
        unfinished = set(ids)
        try:
            while unfinished:
                while arrived:
                    delta = arrived.popleft()
                    if delta.output is not None:
                        unfinished.remove(delta.request_id)
                    yield delta
                if unfinished:
                    self._step()
        except BaseException:
            self._abandon(ids)
            raise
        self._rest()

    def _step(self) -> None:
        """One step for all streams that are open: a thread may begin one while another is."""
        idle_s = self.session.idle_s()
        if idle_s > 0:
            self.session.wait(idle_s)
        for delta in self.session.step():
            arrived = self._arrived.get(delta.request_id)
            if arrived is not None:
                arrived.append(delta)
            if delta.output is not None:
                self._arrived.pop(delta.request_id, None)

    def _abandon(self, ids: Sequence[str]) -> None:
        for request_id in ids:
            self.session.abort_now(request_id)
        while any(request_id in self._arrived for request_id in ids):
            self._step()
        self._rest()

    def _rest(self) -> None:
        """Collects the step that is in flight behind the last request, before idle time is charged to it."""
        while self.session.engine.num_in_flight and not self.session.has_work:
            self._step()

    def _job(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        tools: Tools | None,
        toolbox: Toolbox | None,
        intercept: InterceptOptions | None,
    ) -> _Job:
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise ValueError(
                f"params has {len(each)} entries for {len(prompts)} prompts: expected one, or one for each"
            )
        return _Job(list(prompts), each, tools, toolbox, intercept)


@dataclass(frozen=True, slots=True)
class _Job:
    """Prompts of one call, ready to be added."""

    prompts: list[Prompt]
    params: list[SamplingParams]
    tools: Tools | None  # as they were given
    toolbox: Toolbox | None
    intercept: InterceptOptions | None

    @property
    def num_completions(self) -> int:
        return sum(params.n for params in self.params)


def as_toolbox(tools: Tools | None) -> Toolbox | None:
    """Functions, Tools and schemas as a Toolbox; a Toolbox as it is."""
    return tools if tools is None or isinstance(tools, Toolbox) else Toolbox(tools)


@contextmanager
def closing_own(toolbox: Toolbox | None, tools: Tools | None) -> Iterator[None]:
    """Ends the threads of a toolbox that was made of `tools` for one call; a caller's own Toolbox is left alone."""
    try:
        yield
    finally:
        if toolbox is not None and toolbox is not tools:
            toolbox.close()


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts={prompts!r}: expected a string, a list of token ids, or a list of such")
    if prompts and all(isinstance(token_id, int) for token_id in prompts):
        return [prompts]  # type: ignore[list-item]
    for prompt in prompts:
        if isinstance(prompt, int) or not isinstance(prompt, str | Sequence):
            raise ValueError(f"prompts holds {prompt!r}: expected strings, or lists of token ids")
    return list(prompts)  # type: ignore[arg-type]


def _as_conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
    if not messages:
        raise ValueError("messages is empty: expected at least one message")
    if isinstance(messages[0], Mapping):
        return [messages]  # type: ignore[list-item]
    return list(messages)  # type: ignore[arg-type]
