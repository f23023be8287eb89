"""Conversations of agents, drawn from published statistics.

Each number below is published or called an assumption. A mean and a standard deviation of positive quantities are met
by a log-normal distribution, those of turns by a rounded normal one; quantiles are met exactly, by interpolation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from jaxcept.simulator.workload import Job, Segment

# Assumption: the first prompt (instructions, tools, the task) is a fifth of a conversation; tools return the rest.
PROMPT_SHARE = 0.2
MAX_TOOL_S = 600.0  # assumption: an agent's own timeout
MAX_TOKENS = 200_000  # assumption: the context of the models that were observed


def lognormal(mean: float, std: float) -> Callable[[random.Random], float]:
    """Draws from the log-normal distribution with this mean and standard deviation."""
    variance = math.log(1 + (std / mean) ** 2)
    mu, sigma = math.log(mean) - variance / 2, math.sqrt(variance)
    return lambda rng: rng.lognormvariate(mu, sigma)


def from_quantiles(points: tuple[tuple[float, float], ...]) -> Callable[[random.Random], float]:
    """Draws from the distribution with these (probability, value) quantiles, the first at probability 0.

    Between them, and past the last one, the logarithm of the value is linear in that of 1 - probability: pieces of
    Pareto distributions.
    """
    knots = [(-math.log1p(-probability), math.log(value)) for probability, value in points]

    def draw(rng: random.Random) -> float:
        x = rng.expovariate(1.0)  # -log(1 - uniform)
        index = max(1, next((i for i, (at, _) in enumerate(knots) if at >= x), len(knots) - 1))
        (x0, y0), (x1, y1) = knots[index - 1], knots[index]
        return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0))

    return draw


@dataclass(frozen=True, slots=True)
class AgentClass:
    """One source of conversations: turns, seconds of a tool call, tokens of a conversation, generated tokens a turn."""

    name: str
    turns: Callable[[random.Random], float]
    tool_s: Callable[[random.Random], float]
    num_tokens: Callable[[random.Random], float]
    generated_per_turn: float


AGENTS = {
    # Continuum (arXiv 2511.02230), SWE-Bench: turns 10.9 ± 2.1, tool 0.925 ± 3.55 s, 70,126 ± 19,732 tokens.
    # Assumption: 150 tokens a turn, a thought and a call.
    "agent-swe": AgentClass(
        "agent-swe",
        turns=lambda rng: rng.gauss(10.9, 2.1),
        tool_s=lognormal(0.925, 3.55),
        num_tokens=lognormal(70_126, 19_732),
        generated_per_turn=150,
    ),
    # Continuum, BFCL-v4: turns 6.3 ± 2.3, tool 1.92 ± 2.13 s, 93,256 ± 68,687 tokens. Assumption: 150 tokens a turn.
    "agent-bfcl": AgentClass(
        "agent-bfcl",
        turns=lambda rng: rng.gauss(6.3, 2.3),
        tool_s=lognormal(1.92, 2.13),
        num_tokens=lognormal(93_256, 68_687),
        generated_per_turn=150,
    ),
    # Tool times of MORI (16,886 calls): p50 1.1 s, p90 2.0 s, p99 20 s, p99.95 84 s; assumption: none below 0.1 s.
    # vLLM AgentX: median of 43 turns (assumption: log-normal, sigma 0.5), 142,000 tokens in and 444 out.
    "agent-coding": AgentClass(
        "agent-coding",
        turns=lambda rng: 43 * rng.lognormvariate(0.0, 0.5),
        tool_s=from_quantiles(((0.0, 0.1), (0.5, 1.1), (0.9, 2.0), (0.99, 20.0), (0.9995, 84.0))),
        num_tokens=lambda rng: 142_000 * rng.lognormvariate(0.0, 0.5),  # assumption: the median, sigma 0.5
        generated_per_turn=444 / 43,
    ),
}


def draw_agent(agent: AgentClass, rng: random.Random) -> Job:
    """One conversation: every turn but the last calls a tool; what tools return is split at random among the calls."""
    num_turns = max(2, round(agent.turns(rng)))
    generated = [max(1, round(rng.expovariate(1.0) * agent.generated_per_turn)) for _ in range(num_turns)]
    num_others = max(num_turns, min(round(agent.num_tokens(rng)), MAX_TOKENS) - sum(generated))
    num_prompt = max(1, round(num_others * PROMPT_SHARE))
    weights = [rng.expovariate(1.0) for _ in range(num_turns - 1)]
    per_weight = (num_others - num_prompt) / sum(weights)
    segments = [
        Segment(count, agent.name, min(agent.tool_s(rng), MAX_TOOL_S), round(weight * per_weight))
        for count, weight in zip(generated[:-1], weights, strict=True)
    ]
    return Job(agent.name, 0.0, num_prompt, (*segments, Segment(generated[-1])))
