"""What cannot be served is refused with what came, what was expected and what to do."""

from typing import Any

import pytest

from jaxcept.scheduler.config import SchedulerConfig
from tests.fakes import Rig


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((), "prompt_ids is empty: expected at least one token id"),
        ((1, -1), "prompt_ids has id -1: expected 0 to 250"),
        ((1, 251), "prompt_ids has id 251: expected 0 to 250"),
        ((1, 2**63), "prompt_ids has id 9223372036854775808"),
        ((1, 2.0), r"prompt_ids holds 2.0: expected integers"),
        ((True,), "prompt_ids holds True: expected integers"),
        (("a",), "prompt_ids holds 'a': expected integers"),
        (tuple(range(40)), "prompt_ids has 40 ids: expected at most 39.*max_model_len=40; shorten the prompt"),
        (tuple(range(32)), "prompt_ids has 32 ids and needs 9 KV blocks of 4 tokens: the pool has 8"),
    ],
)
def test_prompts(prompt: tuple[Any, ...], message: str):
    rig = Rig(num_blocks=8, max_model_len=40)
    with pytest.raises(ValueError, match=message):
        rig.add("r", prompt)
    assert rig.scheduler.num_unfinished == 0
    rig.add("r", tuple(range(31)), max_tokens=5)
    rig.run()
    rig.scheduler.check()


def test_a_request_id_that_is_in_use_is_refused():
    rig = Rig()
    rig.add("r", (1, 2))
    with pytest.raises(ValueError, match="request_id='r': expected one that no unfinished request has"):
        rig.add("r", (1, 2))
    rig.engine.abort("r")
    rig.add("r", (1, 2), max_tokens=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_blocks", 0),
        ("block_size", -1),
        ("max_num_seqs", True),
        ("max_num_batched_tokens", 1.5),
        ("max_model_len", 1),
        ("watermark", 1.0),
    ],
)
def test_configurations(field: str, value: Any):
    with pytest.raises(ValueError, match=f"{field}="):
        SchedulerConfig(**{"num_blocks": 8, field: value})
