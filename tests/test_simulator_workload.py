"""Workloads against the figures that they were published with."""

from __future__ import annotations

import random
from statistics import mean, median, pstdev

import pytest

from jaxcept.simulator.agents import AGENTS, MAX_TOKENS
from jaxcept.simulator.mixes import CLASSES, WORKLOADS, infercept_jobs, make_workload
from jaxcept.simulator.workload import Job, Segment, Workload, make_request, scaled


def of(kind: str) -> list[Job]:
    return [job for job in infercept_jobs() if job.kind == kind]


# The paper's Table 1: mean and standard deviation of the interception's seconds.
TABLE = {
    "Math": (9e-5, 6e-5),
    "QA": (0.69, 0.17),
    "VE": (0.09, 0.014),
    "Chatbot": (28.6, 15.6),
    "Image": (20.03, 7.8),
    "TTS": (17.24, 7.6),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_interceptions_take_as_long_as_in_the_paper(kind: str):
    means = [mean(segment.duration_s for segment in job.interceptions) for job in of(kind)]
    assert mean(means) == pytest.approx(TABLE[kind][0], rel=0.06)
    assert pstdev(means) == pytest.approx(TABLE[kind][1], rel=0.06)


def test_the_mix_is_whole():
    jobs = infercept_jobs()
    assert len(jobs) == 397 and sum(len(job.interceptions) for job in jobs) == 1841
    assert min(segment.num_returned for job in jobs for segment in job.segments) == 0
    assert mean(job.num_prompt for job in jobs) == pytest.approx(539, rel=0.02)
    assert mean(job.num_generated for job in jobs) == pytest.approx(371, rel=0.02)
    assert mean(job.num_returned for job in jobs) == pytest.approx(121, rel=0.02)


def test_arrivals_are_poisson_and_the_requests_are_the_same_at_every_rate():
    slow, fast = make_workload("mix", 4000, 2.0, 7), make_workload("mix", 4000, 4.0, 7)
    gaps = [b.arrival_s - a.arrival_s for a, b in zip(slow.jobs, slow.jobs[1:], strict=False)]
    assert mean(gaps) == pytest.approx(0.5, rel=0.05) and pstdev(gaps) == pytest.approx(0.5, rel=0.05)
    assert [job.segments for job in slow.jobs] == [job.segments for job in fast.jobs]
    assert slow.jobs[-1].arrival_s == pytest.approx(2 * fast.jobs[-1].arrival_s)
    assert make_workload("mix", 50, 2.0, 7) == make_workload("mix", 50, 2.0, 7)
    assert make_workload("mix", 50, 2.0, 8) != make_workload("mix", 50, 2.0, 7)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_can_be_drawn(name: str):
    workload = make_workload(name, 40, 1.0, 0, length_scale=0.1)
    assert len(workload.jobs) == 40 and workload.max_tokens > 0
    kinds = {job.kind for job in workload.jobs}
    if name.title() in CLASSES or name in AGENTS:
        assert {kind.lower() for kind in kinds} == {name}
    if name == "plain":
        assert not any(job.interceptions for job in workload.jobs)


def test_plain_traffic_has_the_tokens_of_the_mix():
    plain, mix = make_workload("plain", 100, 1.0, 3), make_workload("mix", 100, 1.0, 3)
    assert [job.num_tokens for job in plain.jobs] == [job.num_tokens for job in mix.jobs]


def test_agents_have_the_published_figures():
    swe = make_workload("agent-swe", 3000, 1.0, 0).jobs
    assert mean(len(job.segments) for job in swe) == pytest.approx(10.9, rel=0.02)
    assert pstdev([len(job.segments) for job in swe]) == pytest.approx(2.1, rel=0.05)
    assert mean(job.num_tokens for job in swe) == pytest.approx(70_126, rel=0.02)
    times = [segment.duration_s for job in swe for segment in job.interceptions]
    assert mean(times) == pytest.approx(0.925, rel=0.1)
    bfcl = make_workload("agent-bfcl", 3000, 1.0, 0).jobs
    assert mean(len(job.segments) for job in bfcl) == pytest.approx(6.3, rel=0.03)
    assert max(job.num_tokens for job in bfcl) <= MAX_TOKENS + 20  # rounding of what each tool returns


def test_coding_agents_wait_as_long_as_measured():
    jobs = make_workload("agent-coding", 1500, 1.0, 0).jobs
    assert median(len(job.segments) for job in jobs) == pytest.approx(43, rel=0.05)
    times = sorted(segment.duration_s for job in jobs for segment in job.interceptions)
    for share, seconds in ((0.5, 1.1), (0.9, 2.0), (0.99, 20.0), (0.9995, 84.0)):
        assert times[int(share * len(times))] == pytest.approx(seconds, rel=0.2)
    slowest = times[int(0.9 * len(times)) :]
    assert sum(slowest) / sum(times) > 0.4  # a heavy tail


def test_scales():
    job = Job("x", 2.0, 100, (Segment(10, "tool", 4.0, 20), Segment(1, "tool", 4.0, 0), Segment(2)))
    half = scaled(job, 0.5, 0.1)
    assert half == Job("x", 2.0, 10, (Segment(1, "tool", 2.0, 2), Segment(1, "tool", 2.0, 0), Segment(1)))
    assert scaled(job, 1.0, 1.0) is job


def test_a_request_is_scripted():
    job = Job("x", 2.0, 3, (Segment(4, "tool", 1.5, 2), Segment(5)))
    request = make_request("r", job, [1, 2, 3], 10.0)
    (trigger,) = request.intercept.script
    assert (trigger.after_tokens, trigger.tool, trigger.duration_s) == (4, "tool", 1.5)
    assert request.params.max_tokens == 9 and request.params.ignore_eos and request.arrival == 12.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Segment(0), "num_generated=0"),
        (lambda: Segment(1, "t", -1.0), "0 or more"),
        (lambda: Job("x", 0.0, 0, (Segment(1),)), "num_prompt=0"),
        (lambda: Job("x", 0.0, 1, (Segment(1), Segment(1))), "each end in a tool"),
        (lambda: Job("x", 0.0, 1, ()), "expected segments"),
        (lambda: make_workload("mixed", 1, 1.0, 0), "workload='mixed': expected one of mix"),
        (lambda: make_workload("mix", 0, 1.0, 0), "num_requests=0"),
        (lambda: make_workload("mix", 1, 0.0, 0), "rate=0.0"),
        (lambda: Workload("w", (Job("x", 1.0, 1, (Segment(1),)), Job("x", 0.0, 1, (Segment(1),))), 1.0, 0), "order"),
    ],
)
def test_what_is_wrong_is_named(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_draws_come_from_the_seed_alone():
    random.seed(1)
    first = make_workload("agent", 20, 1.0, 5)
    random.seed(2)
    assert make_workload("agent", 20, 1.0, 5) == first
