"""The workloads by name: InferCept's six augmentations together and alone, agents, and traffic without tools."""

from __future__ import annotations

import json
import random
from functools import cache
from importlib.resources import files

from jaxcept.simulator.agents import AGENTS, draw_agent
from jaxcept.simulator.workload import Draw, Job, Segment, Workload, draw_workload

CLASSES = ("Math", "QA", "VE", "Chatbot", "Image", "TTS")
WORKLOADS = ("mix", *(name.lower() for name in CLASSES), "agent", *AGENTS, "plain")


@cache
def infercept_jobs() -> tuple[Job, ...]:
    """The requests of the InferCept evaluation, all arriving at 0; data/README.md says where they are from."""
    text = (files("jaxcept.simulator") / "data" / "infercept_mix_lengths.jsonl").read_text(encoding="utf-8")
    jobs = []
    for line in text.splitlines():
        record = json.loads(line)
        segments = [
            Segment(part["gen"], record["class"], part["int_s"], max(0, part["ret"]))
            if "int_s" in part
            else Segment(part["gen"])
            for part in record["segments"]
        ]
        jobs.append(Job(record["class"], 0.0, record["prompt"], tuple(segments)))
    return tuple(jobs)


def make_workload(
    name: str, num_requests: int, rate: float, seed: int, time_scale: float = 1.0, length_scale: float = 1.0
) -> Workload:
    """A workload of WORKLOADS: `rate` requests per second, as many as `num_requests`; ValueError for another name.

    Prompts are taken to differ from request to request: the data has lengths alone, and does not say what is shared.
    """
    return draw_workload(name, _draw(name), num_requests, rate, seed, time_scale, length_scale)


def _draw(name: str) -> Draw:
    if name == "agent":
        return lambda rng: draw_agent(AGENTS[rng.choice(sorted(AGENTS))], rng)
    if name in AGENTS:
        return lambda rng: draw_agent(AGENTS[name], rng)
    if name not in WORKLOADS:
        raise ValueError(f"workload={name!r}: expected one of {', '.join(WORKLOADS)}")
    jobs = [job for job in infercept_jobs() if name in ("mix", "plain", job.kind.lower())]

    def draw(rng: random.Random) -> Job:
        job = rng.choice(jobs)
        return without_tools(job) if name == "plain" else job

    return draw


def without_tools(job: Job) -> Job:
    """The same tokens in one piece: what tools returned stands in the prompt."""
    return Job("plain", job.arrival_s, job.num_prompt + job.num_returned, (Segment(job.num_generated),))
