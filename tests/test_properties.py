"""Random workloads with interceptions, aborts, timeouts and failures: invariants hold and every token is right."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcept.scheduler.orders import ORDERS
from tests.fakes import VOCAB
from tests.workloads import POLICIES, Workload, World, busy_workload, outputs, plan_digest, without_times

HERE = Path(__file__).parent
TRACES = sorted((HERE / "traces").glob("*.json"))

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """Watchers that raise are part of the workloads; what is logged of them is not of interest here."""
    logger = logging.getLogger("jaxcept.scheduler.lifecycle")
    logger.disabled = True
    yield
    logger.disabled = False


few_ids = st.lists(st.integers(0, VOCAB - 1), max_size=12)
trigger_ids = st.lists(st.integers(0, VOCAB - 1), max_size=25)


@st.composite
def requests(draw: st.DrawFn, max_len: int) -> Workload:
    """One request whose prompt fits."""
    limit = max(1, max_len - 2)
    shared = draw(st.booleans())  # many prompts begin alike, so that the prefix cache and copies have work
    length = draw(st.integers(1, min(limit, 40)))
    first = draw(st.integers(0, VOCAB - 1))
    prompt = [(7 * i if shared else first + 3 * i) % VOCAB for i in range(length)]
    max_tokens = draw(st.integers(1, 24))
    params: dict[str, Any] = {"n": draw(st.sampled_from([1, 1, 1, 2, 3])), "max_tokens": max_tokens}
    params["min_tokens"] = draw(st.integers(0, min(3, max_tokens)))
    params["stop_token_ids"] = draw(few_ids)
    params["ignore_eos"] = draw(st.booleans())
    params["seed"] = draw(st.sampled_from([None, 1, 2]))
    params["logprobs"] = draw(st.sampled_from([None, None, 1]))
    params["prompt_logprobs"] = draw(st.sampled_from([None, None, None, 1]))
    watch = None
    if draw(st.booleans()):
        watch = {
            "stops": draw(few_ids),
            "calls": draw(trigger_ids),
            "turn_calls": draw(st.booleans()),
            "raises_on": draw(st.lists(st.integers(0, VOCAB - 1), max_size=2)),
            "masks": draw(st.sampled_from([None, None, [1, 1], [2, 0], [3, 1], [9, 0]])),
        }
    intercept = {
        "token_ids": draw(trigger_ids),
        "script": draw(st.lists(st.integers(1, 6), max_size=3)),
        "timeout_s": draw(st.sampled_from([3.0, 8.0, 1000.0])),
        "max_interceptions": draw(st.sampled_from([0, 2, 64])),
        "max_returned_tokens": draw(st.sampled_from([None, None, 5])),
        "on_failure": draw(st.sampled_from(["tell", "fail"])),
        "failure_ids": draw(st.lists(st.integers(0, VOCAB - 1), max_size=3)),
    }
    kinds = st.sampled_from(["return", "return", "return", "fail", "hang"])
    answers = st.tuples(kinds, st.integers(0, 6), st.integers(0, 9)).map(list)
    return {
        "at": draw(st.integers(0, 12)),
        "prompt": prompt,
        "params": params,
        "intercept": intercept,
        "eos": draw(st.lists(st.integers(0, VOCAB - 1), max_size=4)),
        "salt": draw(st.sampled_from(["", "", "other"])),
        "watch": watch,
        "abort_at": draw(st.sampled_from([None, None, None, 2, 5, 11, 17])),
        "answers": draw(st.lists(answers, min_size=1, max_size=3)),
    }


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """Requests for an engine that is often too small for them."""
    config = {
        "num_blocks": draw(st.integers(3, 24)),
        "block_size": draw(st.sampled_from([1, 2, 4, 5])),
        "max_num_seqs": draw(st.integers(1, 5)),
        "max_num_batched_tokens": draw(st.sampled_from([1, 2, 3, 5, 8, 16, 64])),
        "max_model_len": draw(st.sampled_from([12, 30, 60])),
        "enable_prefix_caching": draw(st.booleans()),
        "watermark": draw(st.sampled_from([0.0, 0.01, 0.2])),
        "num_host_blocks": draw(st.sampled_from([0, 2, 6, 40])),
    }
    max_len = min(config["max_model_len"], config["num_blocks"] * config["block_size"])
    return {
        "config": config,
        "policy": draw(st.sampled_from(sorted(POLICIES))),
        "depth": draw(st.sampled_from([0, 1, 1, 2])),
        "swaps": [draw(st.integers(0, 3)), draw(st.sampled_from([0, 0, 0, 2, 5]))],
        "wrong": draw(st.sampled_from([None, None, 2, 3, 7, 1000])),
        "requests": draw(st.lists(requests(max_len), min_size=1, max_size=6)),
    }


@given(workloads())
@settings(max_examples=1000)
def test_invariants_hold_everyone_finishes_and_nothing_leaks(workload: Workload):
    World(workload).run()


@given(workloads())
@settings(max_examples=60)
def test_tokens_are_the_same_under_every_policy_depth_and_cache(workload: Workload):
    seen = []
    for policy in POLICIES:
        for depth, caching, wrong in ((0, False, None), (1, True, 5)):
            config = {**workload["config"], "enable_prefix_caching": caching}
            world = World(without_times(workload, policy=policy, depth=depth, config=config, wrong=wrong))
            world.run()
            seen.append(outputs(world))
    assert all(each == seen[0] for each in seen)


@pytest.mark.parametrize("seeds", [range(start, start + 25) for start in range(0, 200, 25)], ids=str)
def test_tokens_are_the_same_with_swaps_in_flight(seeds: range):
    """200 busy workloads: as they are, with aborts and timeouts; then without, under every policy, by every order."""
    for seed in seeds:
        workload = busy_workload(seed)
        World(workload).run()
        seen = []
        for number, policy in enumerate(POLICIES):
            order = ORDERS[(seed + number) % len(ORDERS)]
            wrong = (None, 4)[(seed + number) % 2]
            world = World(without_times({**workload, "policy": policy, "order": order, "wrong": wrong}))
            world.run()
            seen.append(outputs(world))
        assert all(each == seen[0] for each in seen), f"seed {seed}"


@given(workloads())
@settings(max_examples=60)
def test_the_same_workload_gives_the_same_plans(workload: Workload):
    assert plan_digest(World(workload).run()) == plan_digest(World(workload).run())


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_workloads_that_once_found_a_bug(path: Path):
    World(json.loads(path.read_text())).run()


def test_plans_do_not_depend_on_the_hash_seed():
    """Two interpreters with different hash seeds plan the kept traces alike."""
    program = (
        "import json, sys; from pathlib import Path; from tests.workloads import World, plan_digest\n"
        "for path in sys.argv[1:]: print(plan_digest(World(json.loads(Path(path).read_text())).run()))"
    )
    seen = []
    for seed in ("0", "12345"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(HERE.parent)}
        command = [sys.executable, "-c", program, *map(str, TRACES)]
        seen.append(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    assert seen[0] == seen[1] and len(seen[0].split()) == len(TRACES) > 0
