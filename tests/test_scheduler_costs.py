"""Seconds of steps and swaps, and the two profiles that InferCept's public code holds."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcept.scheduler.costs import CostModel, StepLoad, chunk_pairs
from jaxcept.scheduler.plan import Chunk, ChunkKind, Decodes, StepPlan
from tests.costs import FULL, HAND

GPTJ_KV_BYTES = 28 * 4096 * 2 * 2  # layers · width · K and V · 2 bytes
VICUNA_KV_BYTES = 40 * 5120 * 2 * 2


def test_the_load_of_a_plan_counts_what_each_token_attends_to():
    chunks = (
        Chunk(2, 2, ChunkKind.PREFILL, 0, (1, 2, 3), True),
        Chunk(3, 3, ChunkKind.RECOMPUTE, 4, (1, 2), False),
    )
    plan = StepPlan(0, Decodes((0, 1), (0, 1), (9, 4)), chunks, (), (), ())
    # The decodes stand at 9 and 4 and attend to 10 and 5; the chunks' tokens to 1 + 2 + 3 and 5 + 6.
    assert StepLoad.of(plan) == StepLoad(query_tokens=7, context_tokens=10 + 5 + 3 + 6, pairs=15 + 6 + 11, num_seqs=4)


@given(st.integers(0, 50), st.integers(0, 50))
def test_pairs_of_a_chunk(start: int, size: int):
    assert chunk_pairs(start, size) == sum(range(start + 1, start + size + 1))


def test_step_seconds_by_hand():
    assert HAND.step_s(StepLoad(400, 9000, 9000, 5)) == pytest.approx(0.010 + 0.020)
    assert FULL.step_s(StepLoad(400, 9000, 20_000, 5)) == pytest.approx(0.010 + 0.020 + 0.009 + 0.0002)
    assert FULL.step_s(StepLoad(10, 0, 0, 1)) == pytest.approx(0.010 + 0.005), "the weights are read, however few"
    assert FULL.step_s(StepLoad(0, 0, 0, 0)) == 0
    assert FULL.forward_s(100, 50) == FULL.step_s(StepLoad(100, 150, chunk_pairs(50, 100), 1))
    assert HAND.forward_s(0) == 0


def test_swap_seconds_by_hand():
    assert FULL.swap_out_s(1000) == pytest.approx(0.021)
    assert FULL.swap_in_s(1000) == pytest.approx(0.042)
    assert FULL.swap_out_s(0) == FULL.swap_in_s(0) == 0


@given(st.floats(0, 1, allow_subnormal=False))
def test_hidden_tokens_are_the_most_that_move_in_time(seconds: float):
    count = FULL.hidden_tokens(seconds)
    assert count == 0 or max(FULL.swap_out_s(count), FULL.swap_in_s(count)) <= seconds + 1e-9
    assert max(FULL.swap_out_s(count + 1), FULL.swap_in_s(count + 1)) > seconds


def linear(base_s: float, token_s: float, kv_token_bytes: int, link: float) -> CostModel:
    """A published profile with a link of so many bytes per second both ways."""
    swap = kv_token_bytes / link
    return replace(
        HAND, overhead_s=base_s, token_s=token_s, kv_token_bytes=kv_token_bytes, saturation_tokens=384,
        swap_out_token_s=swap, swap_in_token_s=swap,
    )  # fmt: skip


def budget(link: float, *, is_gptj: bool) -> int:
    """N(S) of a published profile."""
    profile = (10e-3, 0.0463e-3, GPTJ_KV_BYTES) if is_gptj else (15.4e-3, 0.0279e-3, VICUNA_KV_BYTES)
    model = linear(*profile, link)
    return model.hidden_tokens(model.forward_s(384))


def test_the_published_profiles_give_the_published_budgets():
    """T_fwd(384) is 27.78 ms and 26.11 ms: 605 tokens of 458,752 bytes ask for a link of 9.991 to 10.008 GB/s, 319 of
    819,200 bytes for 10.007 to 10.039 GB/s. So 10.0 GB/s, to two digits; one link serves both, at 10.0074 GB/s."""
    assert (GPTJ_KV_BYTES, VICUNA_KV_BYTES) == (458_752, 819_200)
    assert budget(10.0074e9, is_gptj=True) == 605
    assert budget(10.0074e9, is_gptj=False) == 319
    assert [budget(link, is_gptj=True) for link in (9.990e9, 9.992e9, 10.007e9, 10.009e9)] == [604, 605, 605, 606]
    assert [budget(link, is_gptj=False) for link in (10.006e9, 10.008e9, 10.038e9, 10.040e9)] == [318, 319, 319, 320]


@pytest.mark.parametrize(("name", "tokens"), [("gptj-6b@a100", 605), ("vicuna-13b@2xa100", 319)])
def test_the_cost_models_that_ship_give_the_published_budgets(name: str, tokens: int):
    folder = Path(__file__).parent.parent / "jaxcept" / "simulator" / "cost_models"
    model = CostModel.load(folder / f"{name}.json")
    assert model.saturation_tokens == 384
    assert model.hidden_tokens(model.forward_s(384)) == tokens
    assert model.kv_token_bytes / model.swap_out_token_s == pytest.approx(10.0e9, rel=0.003)
    assert all(model.sources[field] for field in ("overhead_s", "token_s", "saturation_tokens", "swap_out_token_s"))


def test_a_model_survives_its_file(tmp_path: Path):
    FULL.save(tmp_path / "costs.json")
    assert CostModel.load(tmp_path / "costs.json") == FULL
    assert CostModel.from_json(FULL.to_json()) == FULL


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"token_s": -1.0}, "token_s=-1.0"),
        ({"pair_s": math.nan}, "pair_s=nan"),
        ({"floor_s": "fast"}, "floor_s='fast'"),
        ({"saturation_tokens": 0}, "saturation_tokens=0"),
        ({"sources": None}, "sources=None"),
        ({"name": 5}, "name=5"),
        ({"kv_token_bytes": 1.5}, "kv_token_bytes=1.5"),
    ],
)
def test_a_bad_value_is_named(change: dict[str, object], named: str):
    with pytest.raises(ValueError, match=named):
        replace(HAND, **change)


def test_a_bad_file_is_named(tmp_path: Path):
    path = tmp_path / "costs.json"
    for text, named in [("{", "JSON"), ("[]", "list"), ("{}", "token_s"), ('{"speed": 1}', "speed")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"costs\.json.*{named}"):
            CostModel.load(path)
