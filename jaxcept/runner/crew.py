"""How the hosts of one engine talk: the first one sends, the others obey, and who falls silent ends the run.

One TCP connection from each other host to the first. Messages are msgpack, each with its length before it: values of
known types, so that nothing that arrives can be run. Both ends send a sign of life every second; a connection that
breaks, or is silent for SILENCE_S, is a lost host. The network between the hosts has to be a trusted one, as it has
to be for `jax.distributed`.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import fields
from typing import Any, get_type_hints

import msgspec

from jaxcept.scheduler.params import SamplingParams
from jaxcept.scheduler.plan import RowSetup, StepPlan

logger = logging.getLogger(__name__)

BEAT_S = 1.0
WAKE_S = 0.2
SILENCE_S = 15.0
MAX_MESSAGE_BYTES = 1 << 28
_LENGTH_BYTES = 4
# The masks that plans carry say what a structured output may be.
_PARAMS = tuple(field.name for field in fields(SamplingParams) if field.name != "structured")


class HostLostError(RuntimeError):
    """A host of this engine is gone, or does not obey; the engine cannot go on."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A host's first words: which one it is, and what has to be the same on all."""

    host_id: int
    settings: dict[str, str]


class Sizes(msgspec.Struct, frozen=True, tag=True):
    """The first host's answer: fields of RunnerConfig."""

    values: dict[str, int]


# Plans and rows as msgpack has them: the same fields, but that parameters, whose types it cannot tell, are a mapping.
_Row: Any = msgspec.defstruct(
    "Row",
    [(name, dict[str, Any] if name == "params" else hint) for name, hint in get_type_hints(RowSetup).items()],
    array_like=True,
)
_Plan: Any = msgspec.defstruct(
    "Plan",
    [(name, tuple[_Row, ...] if name == "rows" else hint) for name, hint in get_type_hints(StepPlan).items()],
)


class Run(msgspec.Struct, frozen=True, tag=True):
    """A plan, and how far swaps were over on the first host when it was made (see StepResult)."""

    body: _Plan
    swaps_over: tuple[int | None, int | None]

    @classmethod
    def of(cls, plan: StepPlan, swaps_over: tuple[int | None, int | None]) -> Run:
        """The message that carries a plan."""
        values = {field.name: getattr(plan, field.name) for field in fields(StepPlan)}
        values["rows"] = tuple(
            _Row(**(setup._asdict() | {"params": {name: getattr(setup.params, name) for name in _PARAMS}}))
            for setup in plan.rows
        )
        return cls(_Plan(**values), swaps_over)

    @property
    def plan(self) -> StepPlan:
        """The plan that the message carries."""
        values = msgspec.structs.asdict(self.body)
        rows = (msgspec.structs.asdict(row) for row in values["rows"])
        values["rows"] = tuple(RowSetup(**(row | {"params": SamplingParams(**row["params"])})) for row in rows)
        return StepPlan(**values)


class Ready(msgspec.Struct, frozen=True, tag=True):
    """A host has come so far; the first one's says that all have."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """The run is over. With a reason, or from another host than the first, it is an error there."""

    reason: str = ""


class Beat(msgspec.Struct, frozen=True, tag=True):
    """A sign of life."""


Message = Hello | Sizes | Run | Ready | Stop | Beat
_DECODER = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The message as it goes over the wire."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def decode(body: bytes) -> Message:
    """A message without its length. HostLostError where it is none."""
    try:
        message: Message = _DECODER.decode(body)
    except (msgspec.DecodeError, ValueError) as error:
        raise HostLostError(f"it sent what is no message: {error}") from error
    return message


class Connection:
    """One connection; `send` from any thread, `receive` from one."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.name = name
        self._sock = sock
        self._lock = threading.Lock()
        sock.settimeout(SILENCE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Message) -> None:
        """HostLostError where the other end is gone, or takes nothing."""
        self.send_bytes(encode(message))

    def send_bytes(self, data: bytes) -> None:
        """The same for a message that is encoded already."""
        try:
            with self._lock:
                self._sock.sendall(data)
        except OSError as error:
            raise HostLostError(f"{self.name} is lost: {error}") from error

    def receive(self) -> Message:
        """The next message that is no mere sign of life. HostLostError where none can come."""
        while True:
            size = int.from_bytes(self._read(_LENGTH_BYTES), "big")
            if size > MAX_MESSAGE_BYTES:
                raise HostLostError(f"{self.name}: it sent what is no message")
            message = decode(self._read(size))
            if not isinstance(message, Beat):
                return message

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                part = self._sock.recv(min(count - len(data), 1 << 20))
            except TimeoutError:
                raise HostLostError(f"{self.name} is lost: nothing came from it for {SILENCE_S:g} s") from None
            except OSError as error:
                raise HostLostError(f"{self.name} is lost: {error}") from error
            if not part:
                raise HostLostError(f"{self.name} is lost: it closed the connection")
            data += part
        return bytes(data)

    def close(self) -> None:
        """Ends the connection."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class Crew:
    """The connections of one host, with threads that keep them alive and notice their end.

    `on_lost` is called once, from one of these threads, with what happened.
    """

    def __init__(
        self, connections: list[Connection], on_lost: Callable[[HostLostError], None], *, is_first: bool
    ) -> None:
        self.is_first = is_first
        self.lost: HostLostError | None = None
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._connections = connections
        self._on_lost = on_lost
        self._is_closed = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, name="jaxcept-beat", daemon=True).start()
        for connection in connections:
            threading.Thread(target=self._listen, args=(connection,), name="jaxcept-listen", daemon=True).start()

    def send(self, message: Message) -> None:
        """To every other host. HostLostError where one is gone."""
        self.require_all()
        data = encode(message)
        for connection in self._connections:
            try:
                connection.send_bytes(data)
            except HostLostError as error:
                self._lose(error)
                raise

    def receive(self) -> Message:
        """The next message, however long it takes. HostLostError where a host is gone."""
        while True:
            self.require_all()
            with suppress(queue.Empty):
                return self._inbox.get(timeout=WAKE_S)

    def meet(self) -> None:
        """Waits until every host has come to this place. HostLostError where one will not."""
        if not self.is_first:
            self.send(Ready())
        for _ in self._connections:
            message = self.receive()
            if not isinstance(message, Ready):
                raise HostLostError(f"another host sent {type(message).__name__}, expected that it is ready")
        if self.is_first:
            self.send(Ready())

    def require_all(self) -> None:
        """HostLostError where a host is gone."""
        if self.lost is not None:
            raise self.lost

    def wait_for_loss(self, timeout_s: float) -> None:
        """Raises the HostLostError that comes within so many seconds, if one does."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.require_all()
            time.sleep(0.01)

    def close(self, reason: str = "") -> None:
        """Tells the others that this host is done."""
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        for connection in self._connections:
            with suppress(HostLostError):
                connection.send(Stop(reason))
            connection.close()

    def _beat(self) -> None:
        data = encode(Beat())
        while not self._is_closed.wait(BEAT_S):
            for connection in self._connections:
                try:
                    connection.send_bytes(data)
                except HostLostError as error:
                    self._lose(error)
                    return

    def _listen(self, connection: Connection) -> None:
        try:
            while True:
                message = connection.receive()
                if isinstance(message, Stop) and (message.reason or self.is_first):
                    raise HostLostError(f"{connection.name} failed: {message.reason or 'it left'}")
                self._inbox.put(message)
                if isinstance(message, Stop):
                    self._is_closed.set()
                    connection.close()
                    return
        except HostLostError as error:
            self._lose(error)

    def _lose(self, error: HostLostError) -> None:
        with self._lock:
            if self.lost is not None or self._is_closed.is_set():
                return
            self.lost = error
        self._on_lost(error)


def gather(address: tuple[str, int], num_hosts: int, settings: dict[str, str], timeout_s: float) -> list[Connection]:
    """The first host's connections, once all others have come. HostLostError where they do not, or differ in settings;
    whoever differs is told so."""
    deadline = time.monotonic() + timeout_s
    found: dict[int, Connection] = {}
    with _server(address) as server, ExitStack() as unless_whole:
        while len(found) < num_hosts - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                sock, peer = server.accept()
            except TimeoutError:
                absent = ", ".join(str(i) for i in range(1, num_hosts) if i not in found)
                raise HostLostError(f"after {timeout_s:g} s there is no host {absent}") from None
            connection = Connection(sock, f"host at {peer[0]}")
            unless_whole.callback(connection.close)
            try:
                hello = connection.receive()
            except HostLostError as error:
                logger.warning("a connection that is no host's: %s", error)
                connection.close()
                continue
            _check(hello, connection, found, num_hosts, settings)
            assert isinstance(hello, Hello)
            connection.name = f"host {hello.host_id} ({peer[0]})"
            found[hello.host_id] = connection
        unless_whole.pop_all()
    return [found[i] for i in sorted(found)]


def _check(
    hello: Message, connection: Connection, found: dict[int, Connection], num_hosts: int, settings: dict[str, str]
) -> None:
    if not isinstance(hello, Hello):
        raise HostLostError(f"{connection.name}: it did not say which host it is")
    wrong = [
        f"{name} is {hello.settings.get(name)} there, and {value} on host 0"
        for name, value in settings.items()
        if hello.settings.get(name) != value
    ]
    if not 0 < hello.host_id < num_hosts or hello.host_id in found:
        wrong.append(f"--host-id {hello.host_id}: expected each of 1 to {num_hosts - 1} once")
    if wrong:
        reason = f"host {hello.host_id} does not fit: {'; '.join(wrong)}"
        connection.send(Stop(reason))
        raise HostLostError(reason)


def join(address: tuple[str, int], host_id: int, settings: dict[str, str], timeout_s: float) -> Connection:
    """Another host's connection to the first, which may start later. HostLostError where it does not."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            sock = socket.create_connection(address, timeout=SILENCE_S)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostLostError(f"host 0 is not at {address[0]}:{address[1]}: {error}") from error
            time.sleep(0.1)
    connection = Connection(sock, "host 0")
    connection.send(Hello(host_id, settings))
    return connection


def _server(address: tuple[str, int]) -> socket.socket:
    try:
        return socket.create_server(address)
    except OSError as error:
        if error.errno is None or isinstance(error, PermissionError):
            raise HostLostError(f"host 0 cannot listen at {address[0]}:{address[1]}: {error}") from error
    try:
        return socket.create_server(("", address[1]))  # the name that others know may be no address of this machine
    except OSError as error:
        raise HostLostError(f"host 0 cannot listen at port {address[1]}: {error}") from error
