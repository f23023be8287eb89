"""Each waste of InferCept's table, worked by hand for T_fwd(n) = 10 ms + 0.05 ms · n, M = 1,000 bytes, S = 404."""

import pytest

from jaxcept.scheduler.costs import CostModel
from jaxcept.scheduler.waste import (
    break_even_s,
    chunked_discard_waste,
    discard_waste,
    num_chunks,
    preserve_waste,
    swap_waste,
)
from tests.costs import FULL, HAND
from tests.test_scheduler_costs import GPTJ_KV_BYTES, VICUNA_KV_BYTES, linear

C, OTHER = 1200, 4000


def test_discard():
    # T_fwd(1200) = 70 ms. 0.07 · 1200 · 1000 + 0.07 · 4000 · 1000 = 84,000 + 280,000.
    assert discard_waste(HAND, C, OTHER) == pytest.approx(364_000)


def test_chunked_discard():
    # Four decodes leave 400 tokens of S: 3 chunks, T_fwd(400) = 30 ms. 84,000 / 2 + 3 · 0.03 · 4000 · 1000.
    assert num_chunks(HAND, C, 4) == 3
    assert chunked_discard_waste(HAND, C, OTHER, 3) == pytest.approx(42_000 + 360_000)
    assert chunked_discard_waste(HAND, C, OTHER, 1) == pytest.approx(42_000 + 280_000)
    assert chunked_discard_waste(HAND, 0, OTHER, 1) == 0


def test_preserve():
    # 2 s · 1200 · 1000.
    assert preserve_waste(HAND, C, 2.0) == pytest.approx(2_400_000)


def test_swap():
    # T_swap(1200) = 24 ms, there and back, while 5,200 tokens wait: 2 · 0.024 · 5200 · 1000.
    assert swap_waste(HAND, C, C + OTHER) == pytest.approx(249_600)
    # A slower way in: 25 ms out, 50 ms back.
    assert swap_waste(FULL, C, C + OTHER) == pytest.approx((0.025 + 0.050) * 5200 * 1000)


def test_break_even():
    # 402,000 / (1200 · 1000): held for so long, the context wastes as much.
    seconds = break_even_s(HAND, C, OTHER, 4)
    assert seconds == pytest.approx(0.335)
    assert preserve_waste(HAND, C, seconds) == pytest.approx(chunked_discard_waste(HAND, C, OTHER, 3))


def test_chunks_with_attention_take_the_mean_of_all():
    """A later chunk attends to more: n times the middle one is the sum of all."""
    size = 300
    each = [FULL.forward_s(size, start) for start in range(0, 1200, size)]
    own = FULL.forward_s(1200) * 1200 / 2 * 1000
    assert chunked_discard_waste(FULL, 1200, OTHER, 4) == pytest.approx(own + sum(each) * OTHER * 1000)


def test_chunks_never_vanish_behind_decodes():
    assert num_chunks(HAND, 100, 0) == 1
    assert num_chunks(HAND, 404, 0) == 1 and num_chunks(HAND, 405, 0) == 2
    assert num_chunks(HAND, 1000, 10_000) == 40  # 25 tokens each: a sixteenth of S
    assert num_chunks(HAND, 0, 0) == 1


@pytest.mark.parametrize(
    ("model", "published", "others"),
    [
        (linear(10e-3, 0.0463e-3, GPTJ_KV_BYTES, 10e9), (1.0, 3.0), (13_000, 39_500)),
        (linear(15.4e-3, 0.0279e-3, VICUNA_KV_BYTES, 10e9), (0.6, 1.9), (8_000, 25_500)),
    ],
)
def test_break_even_of_the_published_profiles(
    model: CostModel, published: tuple[float, float], others: tuple[int, int]
):
    """The published range hardly depends on the context. Nobody says for which C_other it was computed: its ends are
    met where the others have 13,000 to 39,500 tokens (6B), or 8,000 to 25,500 (13B), which a pool holds."""
    for seconds, other_tokens in zip(published, others, strict=True):
        durations = [break_even_s(model, tokens, other_tokens) for tokens in (750, 1000, 1400, 2000)]
        assert max(durations) < 1.15 * min(durations)
        assert sum(durations) / 4 == pytest.approx(seconds, rel=0.05)
