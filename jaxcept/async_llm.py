"""The asynchronous Python API: one thread steps the engine, any number of coroutines stream from it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, closing, suppress
from pathlib import Path
from typing import Any, TypeVar

from jaxcept.build import Progress, build_session
from jaxcept.config import EngineConfig
from jaxcept.engine import EngineDeadError
from jaxcept.llm import Message, Prompt, Tools, as_toolbox, closing_own
from jaxcept.outputs import Delta
from jaxcept.scheduler.params import SamplingParams
from jaxcept.session import InterceptOptions, Session
from jaxcept.tools.toolbox import Toolbox

logger = logging.getLogger(__name__)

T = TypeVar("T")


class AsyncLLM:
    """Streams completions to coroutines. Construction blocks while the model loads and compiles.

        async for delta in AsyncLLM().generate("What is 37 * 91?", params, tools=[calculator]): ...

    A coroutine that stops listening (break, cancellation) aborts its request. Options are those of EngineConfig, or a
    whole `config`. `progress(done, total, what)` is called while it starts.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        config: EngineConfig | None = None,
        progress: Progress = lambda done, total, what: None,
        **options: Any,
    ) -> None:
        chosen = config if config is not None else EngineConfig(model=model, **options)
        self.session: Session = build_session(chosen, progress)
        self._streams: dict[str, Stream] = {}  # by request_id; of the engine's thread
        self._waiters = Waiters()
        self._count = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="jaxcept-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        intercept: InterceptOptions | None = None,
        request_id: str | None = None,
        cache_salt: str = "",
    ) -> AsyncIterator[Delta]:
        """Completes one prompt; yields what each step adds. The prompt is read as LLM.generate reads it.

        Raises ValueError on a prompt or parameters that cannot be served, EngineDeadError when the device has failed.
        """
        toolbox = as_toolbox(tools)
        if isinstance(prompt, str) and toolbox is not None and self.session.tokenizer.chat_template is not None:
            prompt = self.session.tokenizer.encode_chat([{"role": "user", "content": prompt}], toolbox.schemas())
        stream = self._stream(prompt, params, toolbox, intercept, request_id, cache_salt)
        with closing_own(toolbox, tools):
            async with aclosing(stream):
                async for delta in stream:
                    yield delta

    async def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        intercept: InterceptOptions | None = None,
        request_id: str | None = None,
        cache_salt: str = "",
    ) -> AsyncIterator[Delta]:
        """Answers one conversation; messages and tools in the OpenAI format."""
        toolbox = as_toolbox(tools)
        prompt = self.session.tokenizer.encode_chat(messages, toolbox.schemas() if toolbox else None)
        stream = self._stream(prompt, params, toolbox, intercept, request_id, cache_salt)
        with closing_own(toolbox, tools):
            async with aclosing(stream):
                async for delta in stream:
                    yield delta

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str,
        toolbox: Toolbox | None = None,
        intercept: InterceptOptions | None = None,
        cache_salt: str = "",
        add_special_tokens: bool = True,
        follows: str | None = None,
        is_open: bool = False,
        priority: int = 0,
    ) -> Stream:
        """Queues one request, as Session.add does; returns once the engine has taken it.

        Raises ValueError on what cannot be served, EngineDeadError when the device has failed.
        """
        taken: asyncio.Future[None] = self._waiters.open()
        stream = Stream(self, request_id, params.n, taken.get_loop())

        def add() -> None:
            try:
                self.session.add(
                    prompt,
                    params,
                    request_id=request_id,
                    toolbox=toolbox,
                    options=intercept,
                    cache_salt=cache_salt,
                    add_special_tokens=add_special_tokens,
                    follows=follows,
                    is_open=is_open,
                    priority=priority,
                )
                self._streams[request_id] = stream
                error = None
            except Exception as caught:
                error = caught
            _settle(taken, error)

        self.session.post(add)
        try:
            await taken
        except asyncio.CancelledError:
            self.session.post(lambda: self._abandon(request_id))
            raise
        return stream

    async def resume(
        self,
        request_id: str,
        text: str | None = None,
        token_ids: Sequence[int] | None = None,
        *,
        index: int = 0,
        interception: int | None = None,
        more: bool = False,
    ) -> None:
        """Goes on with an intercepted completion, as Session.resume does. Raises StateError or ValueError where it
        cannot, EngineDeadError when the device has failed."""
        done: asyncio.Future[None] = self._waiters.open()
        try:
            self.session.resume(
                request_id,
                text,
                token_ids,
                index=index,
                interception=interception,
                more=more,
                on_done=lambda error: _settle(done, error),
            )
            await done
        finally:
            done.cancel()

    def abort(self, request_id: str) -> None:
        """Ends a request in whatever state it is; its stream gets the finish."""
        self.session.abort(request_id)

    async def ask(self, question: Callable[[Session], T]) -> T:
        """What a function of the session gives, called by the thread that owns it between two steps."""
        answer: asyncio.Future[T] = self._waiters.open()

        def call() -> None:
            try:
                value = question(self.session)
            except Exception as error:
                _settle(answer, error)
                return
            _settle(answer, None, value)

        self.session.post(call)
        return await answer

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread is at work."""
        return self._thread.is_alive() and not self._is_closed and not self.session.engine.is_dead

    def close(self) -> None:
        """Ends the engine's thread; whoever still listens or waits is told by an EngineDeadError."""
        self._is_closed = True
        self.session.post(lambda: None)
        self._thread.join()

    async def _stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        toolbox: Toolbox | None,
        intercept: InterceptOptions | None,
        request_id: str | None,
        cache_salt: str,
    ) -> AsyncGenerator[Delta, None]:
        if request_id is None:
            self._count += 1
            request_id = f"async-{self._count}"
        stream = await self.submit(
            prompt,
            params or SamplingParams(),
            request_id=request_id,
            toolbox=toolbox,
            intercept=intercept,
            cache_salt=cache_salt,
        )
        with closing(stream):
            async for delta in stream:
                yield delta

    def _forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    def _abandon(self, request_id: str) -> None:
        self._forget(request_id)
        self.session.abort_now(request_id)

    # The engine's thread.

    def _run(self) -> None:
        why = "the engine was closed"
        try:
            while not self._is_closed:
                self._step()
        except Exception as error:
            logger.exception("the engine's thread failed")
            why = f"the engine's thread failed with {error!r}"
        self._waiters.end(why)
        for stream in self._streams.values():
            _call(stream.loop, stream.put, EngineDeadError(why))
        self._streams.clear()

    def _step(self) -> None:
        idle_s = self.session.idle_s()
        if idle_s > 0:
            self.session.wait(idle_s)
        batches: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Delta]]] = {}
        for delta in self.session.step():
            stream = self._streams.get(delta.request_id)
            if stream is not None:
                batches.setdefault(stream.loop, []).append((stream, delta))
            if delta.output is not None:
                self._streams.pop(delta.request_id, None)
        for loop, batch in batches.items():
            _call(loop, _deliver, batch)


class Waiters:
    """Futures that the engine's thread settles: none is left open when the thread ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: set[asyncio.Future[Any]] = set()
        self._end: str | None = None  # why nobody settles them any more

    def open(self) -> asyncio.Future[Any]:
        """A future of the running loop, for `_settle` to settle. EngineDeadError once the thread has ended."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        with self._lock:
            if self._end is not None:
                raise EngineDeadError(self._end)
            self._futures.add(future)
        future.add_done_callback(self._drop)
        return future

    def end(self, why: str) -> None:
        """Fails those that are open, and refuses further ones."""
        with self._lock:
            self._end = why
            futures = list(self._futures)
        for future in futures:
            _settle(future, EngineDeadError(why))

    def _drop(self, future: asyncio.Future[Any]) -> None:
        with self._lock:
            self._futures.discard(future)


class Stream:
    """What the steps add to one request, as they come. Whoever stops listening calls `close`, or `detach`."""

    def __init__(self, llm: AsyncLLM, request_id: str, n: int, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = request_id
        self.loop = loop
        self._llm = llm
        self._num_unfinished = n
        self._arrived: asyncio.Queue[Delta | Exception] = asyncio.Queue()

    def put(self, item: Delta | Exception) -> None:
        """Hands an item on; in the event loop."""
        self._arrived.put_nowait(item)

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        if not self._num_unfinished:
            raise StopAsyncIteration
        item = await self._arrived.get()
        if isinstance(item, Exception):
            self._num_unfinished = 0
            raise item
        self._num_unfinished -= item.kind == "finished"
        return item

    def close(self) -> None:
        """Aborts what is unfinished."""
        if self._num_unfinished:
            self._num_unfinished = 0
            self._llm.session.post(lambda: self._llm._abandon(self.request_id))

    def detach(self) -> None:
        """Listens no more; the request stays as it is: held, for a later one to go on with it."""
        self._num_unfinished = 0
        self._llm.session.post(lambda: self._llm._forget(self.request_id))


def _deliver(batch: list[tuple[Stream, Delta]]) -> None:
    for stream, delta in batch:
        stream.put(delta)


def _settle(future: asyncio.Future[Any], error: Exception | None, value: Any = None) -> None:
    """Settles a future of another thread's loop, unless somebody has."""

    def settle() -> None:
        if future.done():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    _call(future.get_loop(), settle)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
    """Calls a function in a loop of another thread; a loop that is closed hears nothing any more."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)
