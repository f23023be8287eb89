"""Threads for the toolbox: a pool that outlives stuck functions, and an event loop in a thread."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
Job = Callable[[], None]
_CLOSE_WAIT_S = 2.0
_IDLE_S = 30.0


class Worker(threading.Thread):
    """One daemon thread of a pool: a stuck function never keeps the process from ending."""

    def __init__(self, pool: ThreadPool, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.pool = pool
        self.is_written_off = False

    def run(self) -> None:
        """Run jobs until the pool closes, writes this thread off, or has none for a while."""
        while (job := self.pool.take(self)) is not None:
            job()


class ThreadPool:
    """Runs jobs on at most `max_threads` threads, started when needed.

    A job must not raise. `write_off` gives a thread up whose job runs too long: another may start in its place, and the
    thread ends when its job does.
    """

    def __init__(self, max_threads: int, name: str = "tool") -> None:
        self._max_threads = max_threads
        self._name = name
        self._lock = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._threads = 0
        self._idle = 0
        self._written_off = 0
        self._is_closed = False

    @property
    def num_written_off(self) -> int:
        """Threads given up that still run."""
        return self._written_off

    def submit(self, job: Job) -> None:
        """Queue a job. After close it is dropped. RuntimeError where no thread can be started and there is none."""
        with self._lock:
            if self._is_closed:
                return
            self._jobs.append(job)
            if self._idle >= len(self._jobs):
                self._lock.notify()
            elif not self._grow():
                self._jobs.pop()
                raise RuntimeError("no thread can be started for the tool")

    def take(self, worker: Worker) -> Job | None:
        """The next job for a worker, waiting for one; None tells it to end."""
        with self._lock:
            if worker.is_written_off:
                self._written_off -= 1
                return None
            self._idle += 1
            self._lock.wait_for(lambda: self._jobs or self._is_closed, _IDLE_S)
            self._idle -= 1
            if self._is_closed or not self._jobs:
                self._threads -= 1
                return None
            return self._jobs.popleft()

    def write_off(self, worker: Worker) -> None:
        """Give up a thread that is inside a job."""
        with self._lock:
            if not worker.is_written_off:
                worker.is_written_off = True
                self._threads -= 1
                self._written_off += 1
                if self._jobs:
                    self._grow()

    def close(self) -> None:
        """Drop queued jobs and let idle threads end; running jobs are left to end by themselves."""
        with self._lock:
            self._is_closed = True
            self._jobs.clear()
            self._lock.notify_all()

    def _grow(self) -> bool:
        """Start a thread where there may be another. Whether there is any for the jobs to wait for."""
        if self._threads < self._max_threads:
            try:
                Worker(self, f"{self._name}-{self._threads + 1}").start()
                self._threads += 1
            except RuntimeError as error:
                logger.warning("no thread for tools beside the %d there are: %s", self._threads, error)
        return self._threads > 0


def _copy_result(task: asyncio.Task[T], future: Future[T]) -> None:
    error = None if task.cancelled() else task.exception()  # asked for in any case: a task complains otherwise
    if task.cancelled():
        future.cancel()
    elif not future.set_running_or_notify_cancel():
        return
    elif error is not None:
        future.set_exception(error)
    else:
        future.set_result(task.result())


class LoopThread:
    """An asyncio event loop that runs in a daemon thread of its own, started at first use."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def call(self, function: Callable[..., object], *args: Any) -> bool:
        """Run function(*args) soon. False where the loop is closed, RuntimeError where no thread can be started."""
        with self._lock:
            if self._is_closed:
                return False
            if self._loop is None:
                self._loop, self._thread = self._start()
            self._loop.call_soon_threadsafe(function, *args)
            return True

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop, from any thread; cancelling the future cancels it. Cancelled where closed."""
        future: Future[T] = Future()

        def start() -> None:
            task = asyncio.ensure_future(coroutine)
            future.add_done_callback(lambda _: self.call(task.cancel))
            task.add_done_callback(lambda ended: _copy_result(ended, future))

        if not self.call(start):
            coroutine.close()
            future.cancel()
        return future

    def start_task(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a coroutine; to be called on the loop's own thread, by way of `call`."""
        assert self._loop is not None, "start_task runs on the loop's thread"
        return self._loop.create_task(coroutine)

    def call_later(self, delay_s: float, function: Callable[[], object]) -> asyncio.TimerHandle:
        """Run a function after a delay; to be called on the loop's own thread, by way of `call`."""
        assert self._loop is not None, "call_later runs on the loop's thread"
        return self._loop.call_later(delay_s, function)

    def close(self) -> None:
        """Cancel all tasks and stop the loop, waiting a moment; a task that blocks the loop is left behind."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            if self._loop is None or self._thread is None:
                return
            self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_WAIT_S)

    def _start(self) -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._run, args=(loop,), name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            loop.close()
            raise
        return loop, thread

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            if tasks:
                loop.run_until_complete(asyncio.wait(tasks, timeout=_CLOSE_WAIT_S / 2))
        finally:
            loop.close()
