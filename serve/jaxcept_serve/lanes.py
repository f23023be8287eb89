"""Sequences as lanes over time: what the page at / draws. An observer of the engine, and a feed that others read."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from jaxcept.clock import Clock
from jaxcept.engine import Engine
from jaxcept.scheduler.events import Event, Finished, Intercepted, Resumed, Returned, Tokens
from jaxcept.scheduler.sequence import SeqState
from jaxcept.scheduler.sequence import Sequence as EngineSequence

SCAN_S = 0.2  # how often lanes are compared with the scheduler's state
KEEP_S = 180.0  # how long moves are remembered for those who come later
MAX_MOVES = 20_000
MAX_LANES = 2_000  # that a frame tells of, the oldest first


class LaneState(StrEnum):
    """What a sequence does, in one letter; a waiting context goes by where most of its blocks are."""

    QUEUED = "q"
    PREFILL = "p"  # known tokens are computed
    RUNNING = "r"
    ON_DEVICE = "d"  # it waits for a tool
    ON_HOST = "h"
    DROPPED = "x"
    ENDED = "e"


WAITS = (LaneState.ON_DEVICE, LaneState.ON_HOST, LaneState.DROPPED)


class Move(NamedTuple):
    """A lane changes its state. `label`: the tool it waits for, or how it ended."""

    serial: int
    lane: int
    at: float  # seconds of the engine's clock
    state: LaneState
    label: str


class LaneRow(NamedTuple):
    """A lane as it is. Blocks of the context on the device, on the host, and given up."""

    lane: int
    state: LaneState
    since: float
    label: str
    num_tokens: int
    device: int
    host: int
    dropped: int


class Frame(NamedTuple):
    """What has happened since a serial, and how things are."""

    now: float  # seconds of the engine's clock
    serial: int
    moves: list[Move]
    rows: list[LaneRow]


@dataclass(slots=True)
class _Lane:
    state: LaneState
    since: float
    label: str = ""


class Lanes:
    """Keeps the moves of the last minutes. `on_step` belongs to the engine's thread, `frame` to any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clock: Clock | None = None
        self._lanes: dict[int, _Lane] = {}
        self._starting: set[int] = set()  # lanes in PREFILL
        self._moves: deque[Move] = deque(maxlen=MAX_MOVES)
        self._serial = 0
        self._rows: list[LaneRow] = []
        self._scanned_at: float | None = None

    # The engine's thread.

    def on_step(self, engine: Engine, events: Sequence[Event], now: float) -> None:
        """Takes what a step brought; looks at all sequences every SCAN_S."""
        with self._lock:
            self._clock = engine.clock
            for event in events:
                if isinstance(event, Tokens):
                    if self._starting:
                        for seq_id in self._starting.intersection(event.seq_ids):
                            self._go(seq_id, event.at, LaneState.RUNNING)
                else:
                    self._on_event(engine, event)
            if self._scanned_at is None or now - self._scanned_at >= SCAN_S:
                self._scanned_at = now
                self._scan(engine, now)

    def _on_event(self, engine: Engine, event: Event) -> None:
        match event:
            case Intercepted():
                self._meet(engine, event.seq_id)
                self._go(event.seq_id, event.at, LaneState.ON_DEVICE, event.tool[:64])
            case Returned():
                self._go(event.seq_id, event.at, LaneState.QUEUED)
            case Resumed():
                lane = self._lanes.get(event.seq_id)
                if lane is not None and lane.state in WAITS:  # a later request took the context over
                    self._go(event.seq_id, event.interception.ended_at, LaneState.QUEUED)
                self._go(event.seq_id, event.at, LaneState.PREFILL)
            case Finished():
                if event.seq_id not in self._lanes:
                    timing = event.timing
                    self._begin(event.seq_id, timing.arrival, timing.first_scheduled_at, timing.first_token_at)
                self._go(event.seq_id, event.timing.finished_at, LaneState.ENDED, event.reason.value)

    def _meet(self, engine: Engine, seq_id: int) -> None:
        seq = engine.scheduler.sequences.get(seq_id)
        if seq is not None and seq_id not in self._lanes:
            self._begin(seq_id, seq.asked_at, seq.first_scheduled_at, seq.first_token_at)

    def _begin(self, seq_id: int, asked_at: float, scheduled_at: float | None, token_at: float | None) -> None:
        self._go(seq_id, asked_at, LaneState.QUEUED)
        if scheduled_at is not None:
            self._go(seq_id, scheduled_at, LaneState.PREFILL)
        if token_at is not None:
            self._go(seq_id, token_at, LaneState.RUNNING)

    def _go(self, seq_id: int, at: float, state: LaneState, label: str = "") -> None:
        lane = self._lanes.get(seq_id)
        if lane is None:
            lane = self._lanes[seq_id] = _Lane(state, at, label)
        elif lane.state is state:
            return
        else:
            lane.state, lane.since, lane.label = state, max(at, lane.since), label
        if state is LaneState.PREFILL:
            self._starting.add(seq_id)
        else:
            self._starting.discard(seq_id)
        self._serial += 1
        self._moves.append(Move(self._serial, seq_id, lane.since, state, label))
        if state is LaneState.ENDED:
            del self._lanes[seq_id]

    def _scan(self, engine: Engine, now: float) -> None:
        rows: list[LaneRow] = []
        for seq_id, seq in engine.scheduler.sequences.items():
            self._meet(engine, seq_id)
            lane = self._lanes[seq_id]
            row = _row(engine, seq, lane, now)
            if row.state is not lane.state:
                self._go(seq_id, now, row.state, row.label)
            if len(rows) < MAX_LANES:
                rows.append(row)
        self._rows = rows
        while self._moves and self._moves[0].at < now - KEEP_S:
            self._moves.popleft()

    # Any thread.

    def frame(self, since: int = 0) -> Frame:
        """What came after the move with this serial; 0: everything that is remembered."""
        with self._lock:
            now = self._clock.now() if self._clock is not None else 0.0
            moves: list[Move] = []
            for move in reversed(self._moves):
                if move.serial <= since:
                    break
                moves.append(move)
            return Frame(now, self._serial, moves[::-1], self._rows)


def _row(engine: Engine, seq: EngineSequence, lane: _Lane, now: float) -> LaneRow:
    """The sequence as it is; its state is told by the scheduler, where events have not told it."""
    device, host = len(seq.blocks), len(seq.host)
    dropped, state, label = 0, lane.state, lane.label
    if seq.state is SeqState.INTERCEPTED and seq.opened is not None:
        label = seq.opened.tool[:64]
        dropped = max(0, engine.scheduler.config.blocks_for(seq.opened.num_computed) - device - host)
        most = max(device, host, dropped)
        state = WAITS[(device, host, dropped).index(most)]
    elif seq.state is SeqState.WAITING:
        state, label = LaneState.QUEUED, ""
    elif seq.state is SeqState.RUNNING and state not in (LaneState.PREFILL, LaneState.RUNNING):
        state, label = (LaneState.RUNNING if seq.is_decoding else LaneState.PREFILL), ""
    since = lane.since if state is lane.state else now
    return LaneRow(seq.seq_id, state, since, label, len(seq.token_ids), device, host, dropped)
