"""The asynchronous Python API: one thread steps the engine, any number of coroutines stream from it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from jaxcept.build import build_session
from jaxcept.config import EngineConfig
from jaxcept.engine import EngineDeadError
from jaxcept.llm import Message, Prompt, Tools, as_toolbox, closing_own
from jaxcept.outputs import Delta
from jaxcept.scheduler.params import SamplingParams
from jaxcept.session import InterceptOptions, Session
from jaxcept.tools.toolbox import Toolbox

logger = logging.getLogger(__name__)

# How long the engine's thread sleeps where nothing can be computed and no message comes.
_IDLE_S = 1.0


class AsyncLLM:
    """Streams completions to coroutines. Construction blocks while the model loads and compiles.

        async for delta in AsyncLLM().generate("What is 37 * 91?", params, tools=[calculator]): ...

    A coroutine that stops listening (break, cancellation) aborts its request. Options are those of EngineConfig.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        self.session: Session = build_session(EngineConfig(model=model, **options), lambda done, total, what: None)
        self._listeners: dict[str, Callable[[Delta | Exception], None]] = {}
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

    async def resume(
        self, request_id: str, text: str | None = None, token_ids: Sequence[int] | None = None, *, index: int = 0
    ) -> None:
        """Goes on with an intercepted completion. Raises StateError or ValueError where it cannot."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def settle(error: Exception | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        self.session.resume(
            request_id, text, token_ids, index=index, on_done=lambda error: loop.call_soon_threadsafe(settle, error)
        )
        await done

    def abort(self, request_id: str) -> None:
        """Ends a request in whatever state it is; its stream gets the finish."""
        self.session.abort(request_id)

    def close(self) -> None:
        """Aborts everything and ends the engine's thread."""
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
        if self._is_closed or not self._thread.is_alive():
            raise EngineDeadError("the engine's thread has ended")
        chosen = params or SamplingParams()
        if request_id is None:
            self._count += 1
            request_id = f"async-{self._count}"
        own_id = request_id
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Delta | Exception]()

        def listen(item: Delta | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(arrived.put_nowait, item)

        def add() -> None:
            try:
                self.session.add(
                    prompt, chosen, request_id=own_id, toolbox=toolbox, options=intercept, cache_salt=cache_salt
                )
                self._listeners[own_id] = listen
            except (ValueError, EngineDeadError) as error:
                listen(error)

        self.session.post(add)
        unfinished = chosen.n
        try:
            while unfinished:
                item = await arrived.get()
                if isinstance(item, Exception):
                    unfinished = 0
                    raise item
                unfinished -= item.kind == "finished"
                yield item
        finally:
            if unfinished:
                self.session.post(lambda: self._abandon(own_id))

    def _abandon(self, request_id: str) -> None:
        self._listeners[request_id] = lambda item: None
        self.session.abort_now(request_id)

    # The engine's thread.

    def _run(self) -> None:
        try:
            while not self._is_closed:
                self._step()
        except Exception as error:
            logger.exception("the engine's thread failed")
            self._fail(error)

    def _step(self) -> None:
        idle_s = self.session.idle_s() if self.session.has_work else _IDLE_S
        if idle_s > 0:
            self.session.wait(idle_s)
        for delta in self.session.step():
            listener = self._listeners.get(delta.request_id)
            if listener is not None:
                listener(delta)
            if delta.output is not None:
                self._listeners.pop(delta.request_id, None)

    def _fail(self, error: Exception) -> None:
        for listener in self._listeners.values():
            listener(EngineDeadError(f"the engine's thread failed with {error!r}"))
        self._listeners.clear()
