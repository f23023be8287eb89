"""Engines as Ray Serve's deployments: Ray places them on devices, watches them and replaces the dead."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from starlette.applications import Starlette

from jaxcept.build import Progress, load_tokenizer
from jaxcept.runner.memory import claim_device
from jaxcept_serve.app import create_app
from jaxcept_serve.observation import Observation
from jaxcept_serve.replicas import Described, EngineLostError, ReplicaService, Turn
from jaxcept_serve.server import Running, ServeConfig, run, silent
from jaxcept_serve.turns import Caller, ChatTurn, ServiceError, TurnEvent

logger = logging.getLogger(__name__)

POLL_S = 1.0
ANSWER_S = 5.0
FIRST_ANSWER_S = 60.0
ABANDONED_S = 10.0  # a server asks its engines every POLL_S; nobody has these any more
MAX_ONGOING = 100_000  # the server's gate and the engine's queue are the limits
_ACCEPTED = "accepted"


class EngineReplica:
    """One engine in a process of its own. Ray makes it, asks for its health, and ends it."""

    def __init__(self, config: ServeConfig) -> None:
        claim_device()
        self._birth = uuid.uuid4().hex
        self._running = Running(config)
        self._asked_at = time.monotonic()

    async def run(self, turn: Turn, caller: Caller) -> AsyncGenerator[Any, None]:
        """_ACCEPTED, then events; or, at any time, a ServiceError's arguments."""
        service = self._running.service
        try:
            if isinstance(turn, ChatTurn):
                events: Any = await service.chat(turn, caller)
            else:
                events = await service.complete(turn, caller)
            yield _ACCEPTED
            try:
                async for event in events:
                    yield event
            finally:
                await events.aclose()
        except ServiceError as error:
            yield {
                "status": error.status,
                "message": error.message,
                "param": error.param,
                "code": error.code,
                "retry_after_s": error.retry_after_s,
            }

    async def describe(self) -> Described:
        """How it is."""
        self._asked_at = time.monotonic()
        service = self._running.service
        return Described(self._birth, service.max_model_len, service.toolbox.schemas(), service.metrics())

    async def silence_s(self) -> float:
        """Seconds since a server asked how it is."""
        return time.monotonic() - self._asked_at

    async def check_health(self) -> None:
        """RuntimeError where the engine is dead, whereupon Ray replaces this replica."""
        if not self._running.llm.is_alive:
            raise RuntimeError("the engine is dead")


class RayEngine:
    """The way to one replica, and to its successors."""

    def __init__(self, name: str, handle: Any) -> None:
        self._name = name
        self.handle = handle

    @property
    def name(self) -> str:
        """What logs call it."""
        return self._name

    async def start(self, turn: Turn, caller: Caller) -> AsyncGenerator[TurnEvent, None]:
        """The turn's events, once it is accepted. ServiceError, EngineLostError."""
        items = self._items(turn, caller)
        await anext(items)
        return items

    def describe(self, timeout_s: float = ANSWER_S) -> Described:
        """How it is. EngineLostError where it does not say so in time."""
        try:
            told: Described = self.handle.describe.remote().result(timeout_s=timeout_s)
        except (RayActorError, RayTaskError, RayServeException, TimeoutError) as error:
            raise EngineLostError(str(error)) from error
        return told

    async def _items(self, turn: Turn, caller: Caller) -> AsyncGenerator[TurnEvent, None]:
        response = self.handle.options(stream=True).run.remote(turn, caller)
        is_over = False
        try:
            async for item in response:
                if isinstance(item, dict):
                    is_over = True
                    raise ServiceError(item.pop("status"), item.pop("message"), **item)
                yield item
            is_over = True
        except (RayActorError, RayServeException) as error:
            is_over = True
            raise EngineLostError(str(error)) from error
        finally:
            if not is_over:
                response.cancel()


class Cluster:
    """One server's engines on Ray, which may be other people's as well: `close` ends what is ours."""

    def __init__(self, config: ServeConfig, count: int) -> None:
        """Names the engines, and starts Ray on this machine, or joins the cluster that RAY_ADDRESS names."""
        model = (*config.model_names, config.engine.model_name)[0]
        server = re.sub(r"[^A-Za-z0-9._-]", "-", f"jaxcept-{model}-{config.port}")
        self._config = config
        self._names = [f"engine-{i}" for i in range(count)]
        self._applications = [f"{server}-{name}" for name in self._names]
        self._has_started = not (ray.is_initialized() or os.environ.get("RAY_ADDRESS"))
        self._has_engines = False
        if not ray.is_initialized():
            ray.init("local" if self._has_started else None, include_dashboard=False, log_to_driver=True)

    def start(self) -> list[RayEngine]:
        """Starts the engines; returns once all are ready. ValueError where another server has engines of these names.

        Each gets as many GPUs as its mesh has devices, where there are GPUs.
        """
        serve.start(http_options={"location": "NoServer"})
        self._require_free()
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        resources: dict[str, Any] = {"num_gpus": self._config.engine.num_devices} if has_gpus else {"num_cpus": 0.01}
        deployment = serve.deployment(
            EngineReplica,
            num_replicas=1,
            max_ongoing_requests=MAX_ONGOING,
            ray_actor_options=resources,
            health_check_period_s=2,
            health_check_timeout_s=30,
        )
        targets = [
            serve.RunTarget(
                target=deployment.options(name=name).bind(self._config), name=application, route_prefix=None
            )
            for name, application in zip(self._names, self._applications, strict=True)
        ]
        self._has_engines = True
        handles = serve.run_many(targets)
        return [RayEngine(name, handle) for name, handle in zip(self._names, handles, strict=True)]

    def close(self) -> None:
        """Ends the engines, and Ray where it was started for them."""
        if self._has_started:
            serve.shutdown()
        elif self._has_engines:
            for application in self._applications:
                serve.delete(application)
        ray.shutdown()

    def _require_free(self) -> None:
        """Engines that a server left behind when it was killed are taken over."""
        known = serve.status().applications
        for application in self._applications:
            if application in known and not _is_abandoned(application):
                raise ValueError(
                    f"{application} is on this Ray cluster already: another server has the same model name and --port; "
                    f"expected another --port. Where none has, end it with ray.serve.delete({application!r})"
                )


def _is_abandoned(application: str) -> bool:
    try:
        silence_s: float = serve.get_app_handle(application).silence_s.remote().result(timeout_s=ANSWER_S)
    except (RayActorError, RayTaskError, RayServeException, TimeoutError):
        return False
    return silence_s > ABANDONED_S


class Front:
    """The server before the engines: HTTP, limits, routing. The parts are those of server.Running."""

    def __init__(self, config: ServeConfig, engines: Sequence[RayEngine]) -> None:
        self.config = config
        names = tuple(config.model_names) or (config.engine.model_name,)
        described = [engine.describe(FIRST_ANSWER_S) for engine in engines]
        self.service = ReplicaService(engines, described, load_tokenizer(config.engine), names)
        self.llm = self.service
        self.observation = Observation(names[0], self.service.max_model_len, config.engine.intercept_policy, None)
        self.app: Starlette = create_app(
            self.observation.observe(self.service), config.options, extra_routes=[self.observation.routes]
        )
        self._engines = engines
        self._is_closed = threading.Event()
        threading.Thread(target=self._poll, name="jaxcept-engines", daemon=True).start()

    def drain(self) -> None:
        """Takes no further request; what runs goes on."""
        self.service.is_draining = True
        self.app.state.api.gate.is_draining = True

    def check(self) -> None:
        """AssertionError where turns are over and still counted."""
        gate = self.app.state.api.gate
        assert gate.num_in_flight or not any(self.service.router.loads.values()), self.service.router.loads

    def close(self) -> None:
        """Asks the engines for nothing more."""
        self._is_closed.set()
        self.service.close()

    def _poll(self) -> None:
        while not self._is_closed.wait(POLL_S):
            for engine in self._engines:
                try:
                    self.service.report(engine.name, engine.describe())
                except EngineLostError as error:
                    logger.debug("%s does not answer: %s", engine.name, error)


def serve_replicas(config: ServeConfig, count: int, progress: Progress = silent) -> int:
    """`jaxcept serve --replicas`: serves until a signal; the exit status."""
    progress(0, count, "starting engines")
    cluster = Cluster(config, count)
    try:
        engines = cluster.start()
        progress(count, count, "starting engines")
        return run(config, running=Front(config, engines))
    finally:
        cluster.close()
