"""What is served: requests with arrivals, lengths, and tools that take their time. Lengths alone, no text."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jaxcept.scheduler.params import InterceptParams, SamplingParams, ScriptedTrigger
from jaxcept.scheduler.request import Request

# No replay waits for a timeout: its tools always return.
TOOL_TIMEOUT_S = 1e6


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of generated tokens and, where `tool` is given, the interception that ends it."""

    num_generated: int
    tool: str | None = None
    duration_s: float = 0.0  # of the interception, seconds
    num_returned: int = 0  # tokens that the tool returns

    def __post_init__(self) -> None:
        if self.num_generated < 1:
            raise ValueError(f"num_generated={self.num_generated}: expected 1 or more")
        if self.duration_s < 0 or self.num_returned < 0:
            raise ValueError(f"{self}: expected a duration and a number of returned tokens of 0 or more")


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a workload. All its segments but the last end in an interception; the last one may."""

    kind: str
    arrival_s: float  # seconds since the workload began
    num_prompt: int
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if self.num_prompt < 1:
            raise ValueError(f"num_prompt={self.num_prompt}: expected 1 or more")
        if not self.segments or any(segment.tool is None for segment in self.segments[:-1]):
            raise ValueError(f"a request of kind {self.kind!r}: expected segments that each end in a tool but the last")

    @property
    def num_generated(self) -> int:
        """Tokens that the model generates."""
        return sum([segment.num_generated for segment in self.segments])

    @property
    def num_returned(self) -> int:
        """Tokens that tools return."""
        return sum([segment.num_returned for segment in self.segments])

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole conversation."""
        return self.num_prompt + self.num_generated + self.num_returned

    @property
    def interceptions(self) -> tuple[Segment, ...]:
        """The segments that end in an interception."""
        return self.segments if self.segments[-1].tool is not None else self.segments[:-1]

    @property
    def tool_s(self) -> float:
        """Seconds of all interceptions."""
        return sum([segment.duration_s for segment in self.interceptions])


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival."""

    name: str
    jobs: tuple[Job, ...]
    rate: float  # requests per second on average
    seed: int
    time_scale: float = 1.0  # of tool times against what they were drawn from
    length_scale: float = 1.0  # of token counts

    def __post_init__(self) -> None:
        if any(a.arrival_s > b.arrival_s for a, b in zip(self.jobs, self.jobs[1:], strict=False)):
            raise ValueError(f"workload {self.name!r}: expected requests in order of arrival")

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest conversation."""
        return max((job.num_tokens for job in self.jobs), default=0)

    @property
    def tool_means(self) -> dict[str, float]:
        """Mean seconds of an interception, by tool: what a profile of the tools would say."""
        seconds: dict[str, list[float]] = {}
        for job in self.jobs:
            for part in job.interceptions:
                seconds.setdefault(part.tool or "", []).append(part.duration_s)
        return {tool: sum(values) / len(values) for tool, values in sorted(seconds.items())}


Draw = Callable[[random.Random], Job]


def draw_workload(
    name: str,
    draw: Draw,
    num_requests: int,
    rate: float,
    seed: int,
    time_scale: float = 1.0,
    length_scale: float = 1.0,
) -> Workload:
    """Poisson arrivals of requests that `draw` draws. With equal seeds the requests are the same at every rate."""
    if num_requests < 1:
        raise ValueError(f"num_requests={num_requests}: expected 1 or more")
    for what, value in (("rate", rate), ("time_scale", time_scale), ("length_scale", length_scale)):
        if not value > 0:
            raise ValueError(f"{what}={value}: expected above 0")
    rng = random.Random(seed)
    jobs, arrival = [], 0.0
    for _ in range(num_requests):
        arrival += rng.expovariate(1.0) / rate
        jobs.append(replace(scaled(draw(rng), time_scale, length_scale), arrival_s=arrival))
    return Workload(name, tuple(jobs), rate, seed, time_scale, length_scale)


def scaled(job: Job, time_scale: float, length_scale: float) -> Job:
    """Tool times and token counts times a factor each; what was there stays at least one token."""
    if time_scale == 1.0 and length_scale == 1.0:
        return job

    def tokens(count: int, least: int = 1) -> int:
        return max(least, round(count * length_scale))

    segments = [
        Segment(
            tokens(segment.num_generated),
            segment.tool,
            segment.duration_s * time_scale,
            tokens(segment.num_returned, min(1, segment.num_returned)),
        )
        for segment in job.segments
    ]
    return replace(job, num_prompt=tokens(job.num_prompt), segments=tuple(segments))


def make_request(name: str, job: Job, prompt_ids: Sequence[int], start: float) -> Request:
    """The request that plays a job: its interceptions are scripted by count, no token ends it. Clock at `start`."""
    triggers = [ScriptedTrigger(part.num_generated, part.tool or "", part.duration_s) for part in job.interceptions]
    return Request(
        request_id=name,
        prompt_ids=tuple(prompt_ids),
        params=SamplingParams(temperature=0.0, max_tokens=job.num_generated, ignore_eos=True),
        intercept=InterceptParams(script=tuple(triggers), timeout_s=TOOL_TIMEOUT_S, max_interceptions=len(triggers)),
        arrival=start + job.arrival_s,
    )
