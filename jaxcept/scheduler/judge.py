"""Whether a generated token ends or intercepts its sequence."""

from __future__ import annotations

from typing import NamedTuple

from jaxcept.scheduler.events import FinishReason
from jaxcept.scheduler.sequence import Sequence
from jaxcept.scheduler.watcher import Verdict


class End(NamedTuple):
    """The sequence ends."""

    reason: FinishReason
    stop_reason: int | str | None = None


class Call(NamedTuple):
    """The sequence is intercepted."""

    tool: str
    payload: object | None = None
    actual_s: float | None = None  # how long the tool takes, in a replay that knows it
    hold_s: float | None = None  # the sequence ends if nothing comes so long


class Reject(NamedTuple):
    """The token is taken back."""


def judge(seq: Sequence, token_id: int, max_len: int) -> End | Call | Reject | None:
    """The ruling on the token appended last.

    In order: the watcher's mask, interception token ids, stop token ids, the watcher, the scripted trigger, max_tokens,
    the model's length. No stop counts before min_tokens; an interception is no stop. The watcher sees every token
    first.
    """
    watcher = seq.watcher
    verdict = watcher.push(token_id) if watcher is not None else None
    if verdict is not None and verdict.kind == "reject":
        return Reject()
    ruling = _ruling(seq, token_id, verdict, max_len)
    is_bounded = isinstance(ruling, Call) and ruling.hold_s is None
    if is_bounded and seq.num_interceptions - seq.num_foreign >= seq.request.intercept.max_interceptions:
        return End(FinishReason.TOOL_LIMIT)
    return ruling


def _ruling(seq: Sequence, token_id: int, verdict: Verdict | None, max_len: int) -> End | Call | None:
    request = seq.request
    call = _call(verdict) if verdict is not None and verdict.kind == "intercept" else None
    may_stop = seq.num_output >= request.params.min_tokens
    if token_id in request.intercept.token_ids:
        return call or Call(f"token:{token_id}")
    if token_id in seq.stop_ids and may_stop:
        return call or _end_of_turn(seq, token_id)
    if verdict is not None and (call is not None or may_stop):
        return call or End(FinishReason.STOP, verdict.reason)
    num_tokens = len(seq.token_ids)
    script = seq.next_script
    if script is not None and num_tokens >= seq.script_len:
        return Call(script.tool, actual_s=script.duration_s)
    if seq.is_exhausted or num_tokens >= max_len:
        return End(FinishReason.LENGTH)
    return None


def _end_of_turn(seq: Sequence, token_id: int) -> End | Call:
    verdict = seq.watcher.end_of_turn() if seq.watcher is not None else None
    if verdict is not None and verdict.kind == "intercept":
        return _call(verdict)
    if verdict is not None:
        return End(FinishReason.STOP, verdict.reason)
    return End(FinishReason.STOP, token_id if token_id in seq.request.params.stop_token_ids else None)


def _call(verdict: Verdict) -> Call:
    return Call(verdict.reason, verdict.payload, hold_s=verdict.hold_s)
