"""Host time of a step in steady decode, with a runner that costs nothing.

    python benchmarks/host_time.py [--context 1000] [--steps 400] [--build]

Every sequence decodes; step k + 1 is planned before step k is collected. `--build` also lays each plan out as the
padded batch of the device runner. Times are medians and 90th percentiles over the steps, milliseconds.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import deque
from collections.abc import Callable
from statistics import median, quantiles

from jaxcept.scheduler.config import SchedulerConfig
from jaxcept.scheduler.params import SamplingParams
from jaxcept.scheduler.plan import StepPlan, StepResult
from jaxcept.scheduler.policies.preserve import Preserve
from jaxcept.scheduler.request import Request
from jaxcept.scheduler.scheduler import Scheduler

BLOCK_SIZE = 16
Builder = Callable[[StepPlan], object]


def make_scheduler(num_seqs: int, context: int, steps: int) -> Scheduler:
    """A scheduler with room for `num_seqs` sequences that outlive the measurement; requests are queued."""
    max_len = context + steps + 2 * BLOCK_SIZE
    num_blocks = num_seqs * (max_len // BLOCK_SIZE + 2)
    budget = max(2048, num_seqs)
    config = SchedulerConfig(num_blocks, BLOCK_SIZE, num_seqs, budget, max_len, vocab_size=32_000)
    scheduler = Scheduler(config, Preserve())
    params = SamplingParams(max_tokens=None, stop_token_ids=(2,))
    for i in range(num_seqs):
        # Lengths differ, so that block boundaries are spread over the steps as in traffic.
        prompt = tuple((i * 7919 + j) % 31_000 + 100 for j in range(context - i % BLOCK_SIZE))
        scheduler.add(Request(f"r{i}", prompt, params, eos_token_ids=(1,)), now=float(i))
    return scheduler


def make_builder(num_seqs: int, context: int, steps: int) -> Builder:
    """The device runner's batch layout, without a device."""
    from jaxcept.runner.batch import BatchBuilder, BatchShape, token_buckets

    max_len = context + steps + 2 * BLOCK_SIZE
    num_blocks = num_seqs * (max_len // BLOCK_SIZE + 2)
    shape = BatchShape(num_seqs, -(-max_len // BLOCK_SIZE), BLOCK_SIZE, num_blocks)
    builder = BatchBuilder(shape, token_buckets(max(2048, num_seqs)))

    def build(plan: StepPlan) -> object:
        builder.update_tables(plan.tables)
        return builder.build(plan)

    return build


def measure(num_seqs: int, context: int, steps: int, build: Builder | None) -> dict[str, list[float]]:
    """Milliseconds of each part, one entry per step."""
    scheduler = make_scheduler(num_seqs, context, steps)
    in_flight: deque[StepPlan] = deque()
    times: dict[str, list[float]] = {"schedule": [], "build": [], "update": [], "total": []}
    clock = time.perf_counter
    measured = 0
    while measured < steps:
        start = clock()
        plan = scheduler.schedule(0.0)
        scheduled = clock()
        assert plan is not None
        if build is not None:
            build(plan)
        built = clock()
        in_flight.append(plan)
        if len(in_flight) < 2:
            continue
        done = in_flight.popleft()
        result = StepResult(done.step_id, (777,) * len(done.sampling_seq_ids), {}, {})
        collected = clock()
        scheduler.update(done, result, 0.0)
        end = clock()
        if plan.chunks or done.chunks:
            continue  # still prefilling
        measured += 1
        parts = (scheduled - start, built - scheduled, end - collected)
        for name, seconds in zip(times, (*parts, sum(parts)), strict=True):
            times[name].append(seconds * 1e3)
    return times


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--build", action="store_true", help="lay out the padded batch too (needs JAX)")
    args = parser.parse_args()
    print(f"Python {platform.python_version()}, {platform.machine()}, contexts of about {args.context} tokens,"
          f" {args.steps} steps, milliseconds: median (90th percentile)")  # fmt: skip
    names = ["schedule", *(["build"] if args.build else []), "update", "total"]
    print("".join(f"{name:>20}" for name in ("sequences", *names)))
    for num_seqs in args.sequences:
        build = make_builder(num_seqs, args.context, args.steps) if args.build else None
        times = measure(num_seqs, args.context, args.steps, build)
        cells = [f"{median(times[name]):.3f} ({quantiles(times[name], n=10)[-1]:.3f})" for name in names]
        print("".join(f"{cell:>20}" for cell in (str(num_seqs), *cells)))


if __name__ == "__main__":
    main()
