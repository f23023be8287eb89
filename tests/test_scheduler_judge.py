"""In which order a token's meanings are weighed."""

import pytest

from jaxcept.scheduler.events import FinishReason
from jaxcept.scheduler.judge import Call, End, judge
from jaxcept.scheduler.params import InterceptParams, SamplingParams, ScriptedTrigger
from jaxcept.scheduler.request import Request
from jaxcept.scheduler.sequence import Family, Sequence
from tests.fakes import FakeWatcher

TOKEN = 7
SCRIPT = (ScriptedTrigger(1, "script"),)


def ruling(
    watcher: FakeWatcher | None = None,
    *,
    token_ids: tuple[int, ...] = (),
    script: tuple[ScriptedTrigger, ...] = (),
    eos: tuple[int, ...] = (),
    max_len: int = 100,
    max_interceptions: int = 64,
    **params: object,
) -> End | Call | None:
    """The ruling on TOKEN as the first token after a prompt of three."""
    intercept = InterceptParams(token_ids=token_ids, script=script, max_interceptions=max_interceptions)
    request = Request(
        "r",
        (1, 2, 3),
        SamplingParams(**params),
        intercept,
        eos_token_ids=eos,
        watcher=None if watcher is None else lambda _: watcher,
    )
    seq = Sequence(0, 0, Family(request), 0.0, max_len)
    seq.token_ids.append(TOKEN)
    return judge(seq, TOKEN, max_len)


STOPPER = FakeWatcher(stops=frozenset([TOKEN]))
CALLER = FakeWatcher(calls=frozenset([TOKEN]))
TURN = FakeWatcher(turn_calls=True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"max_tokens": 1}, End(FinishReason.LENGTH)),
        ({"max_len": 4}, End(FinishReason.LENGTH)),
        ({"script": SCRIPT}, Call("script")),
        ({"script": SCRIPT, "max_tokens": 1}, Call("script")),
        ({"stop_token_ids": [TOKEN]}, End(FinishReason.STOP, TOKEN)),
        ({"eos": (TOKEN,)}, End(FinishReason.STOP)),
        ({"eos": (TOKEN,), "ignore_eos": True}, None),
        ({"eos": (TOKEN,), "script": SCRIPT}, End(FinishReason.STOP)),
        ({"eos": (TOKEN,), "min_tokens": 2}, None),
        ({"eos": (TOKEN,), "min_tokens": 1}, End(FinishReason.STOP)),
        ({"token_ids": (TOKEN,)}, Call(f"token:{TOKEN}")),
        ({"token_ids": (TOKEN,), "stop_token_ids": [TOKEN]}, Call(f"token:{TOKEN}")),
        ({"token_ids": (TOKEN,), "min_tokens": 2}, Call(f"token:{TOKEN}")),
        ({"watcher": STOPPER}, End(FinishReason.STOP, f"<{TOKEN}>")),
        ({"watcher": STOPPER, "min_tokens": 2}, None),
        ({"watcher": STOPPER, "min_tokens": 2, "script": SCRIPT}, Call("script")),
        ({"watcher": STOPPER, "script": SCRIPT}, End(FinishReason.STOP, f"<{TOKEN}>")),
        ({"watcher": STOPPER, "eos": (TOKEN,)}, End(FinishReason.STOP)),
        ({"watcher": CALLER}, Call("lookup", {"id": TOKEN})),
        ({"watcher": CALLER, "min_tokens": 2}, Call("lookup", {"id": TOKEN})),
        ({"watcher": CALLER, "eos": (TOKEN,)}, Call("lookup", {"id": TOKEN})),
        ({"watcher": CALLER, "token_ids": (TOKEN,)}, Call("lookup", {"id": TOKEN})),
        ({"watcher": TURN}, None),
        ({"watcher": TURN, "eos": (TOKEN,)}, Call("turn")),
        ({"watcher": TURN, "eos": (TOKEN,), "max_interceptions": 0}, End(FinishReason.TOOL_LIMIT)),
        ({"script": SCRIPT, "max_interceptions": 0}, End(FinishReason.TOOL_LIMIT)),
    ],
)
def test_order(given, expected):
    assert ruling(**given) == expected


def test_the_length_counts_generated_tokens_over_all_interceptions():
    request = Request("r", (1, 2, 3), SamplingParams(max_tokens=4), InterceptParams(script=SCRIPT))
    seq = Sequence(0, 0, Family(request), 0.0, 100)
    assert (seq.stop_len, seq.last_position) == (4, 3)
    seq.token_ids.append(TOKEN)
    seq.append_returned((8, 9))
    seq.rearm(100)
    assert seq.stop_len == 7, "no interception was recorded, so the script's first entry is armed again"
    assert seq.output_spans == ((3, 4),) and seq.num_output == 1
