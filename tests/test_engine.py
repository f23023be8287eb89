"""The loop: what is submitted and collected when, and what a dead device means."""

import pytest

from jaxcept.clock import MonotonicClock, VirtualClock
from jaxcept.engine import Engine, EngineDeadError
from jaxcept.metrics import Ledger
from jaxcept.scheduler.events import Finished, Intercepted
from jaxcept.scheduler.plan import StepPlan, StepResult
from jaxcept.scheduler.request import Request
from tests.fakes import FakeRunner, Rig, scripted


class LoggingRunner(FakeRunner):
    """Writes down the order of calls."""

    def __init__(self) -> None:
        super().__init__(32, 4, 4)
        self.calls: list[str] = []
        self.fail_collect = False

    def submit(self, plan: StepPlan) -> None:
        self.calls.append(f"submit {plan.step_id}")
        super().submit(plan)

    def collect(self) -> StepResult:
        result = super().collect()
        self.calls.append(f"collect {result.step_id}")
        if self.fail_collect:
            raise OSError("the device fell off the bus")
        return result


def rig_with(runner: LoggingRunner, depth: int) -> Rig:
    rig = Rig(depth=depth)
    rig.runner = rig.engine.runner = runner
    return rig


@pytest.mark.parametrize(
    ("depth", "calls"),
    [
        (0, ["submit 0", "collect 0", "submit 1", "collect 1", "submit 2", "collect 2"]),
        (1, ["submit 0", "submit 1", "collect 0", "submit 2", "collect 1", "collect 2"]),
        (2, ["submit 0", "submit 1", "submit 2", "collect 0", "collect 1", "collect 2"]),
    ],
)
def test_the_next_step_is_submitted_before_the_last_is_collected(depth: int, calls: list[str]):
    runner = LoggingRunner()
    rig = rig_with(runner, depth)
    rig.add("r", (1, 2, 3), max_tokens=3)
    rig.run()
    assert runner.calls == calls
    assert rig.engine.step() == [] and not rig.engine.has_work


@pytest.mark.parametrize("where", ["submit", "collect"])
def test_a_failing_runner_ends_everyone_and_the_engine_says_so(where: str):
    runner = LoggingRunner()
    rig = rig_with(runner, 1)
    rig.add("intercepted", (1, 2, 3), scripted(1), max_tokens=3)
    while not rig.told(Intercepted):
        rig.step()
    rig.add("running", (4, 5, 6), max_tokens=9, n=2)
    rig.step()
    rig.add("waiting", (7,), max_tokens=9)
    runner.fail_at, runner.fail_collect = (len(runner.plans), False) if where == "submit" else (None, True)
    rig.step()
    ends = rig.told(Finished)
    assert [(event.request_id, event.reason) for event in ends] == [
        ("intercepted", "error"),
        ("running", "error"),
        ("running", "error"),
        ("waiting", "error"),
    ]
    assert rig.engine.is_dead and rig.scheduler.num_held_blocks == 0 and not rig.engine.has_work
    for call in (
        rig.engine.step,
        lambda: rig.engine.resume("intercepted", (1,)),
        lambda: rig.engine.fail("intercepted"),
        lambda: rig.engine.add(Request("late", (1,))),
    ):
        with pytest.raises(EngineDeadError, match="its runner failed with"):
            call()
    assert rig.engine.abort("running") is False


def test_it_rests_while_everyone_waits_for_a_tool_and_wakes_in_time():
    rig = Rig(depth=1)
    rig.add("r", (1, 2, 3), scripted(1, timeout_s=60.0), max_tokens=3)
    rig.run()
    (event,) = rig.told(Intercepted)
    assert rig.engine.next_deadline() == event.at + 60.0 and rig.engine.num_in_flight == 0
    assert rig.step() is None and not rig.engine.has_work
    rig.clock.advance_to(event.at + 60.0)
    assert rig.step() is not None
    rig.run()
    assert len(rig.told(Finished)) == 1 and rig.engine.next_deadline() is None


def test_an_abort_is_told_with_the_next_step():
    rig = Rig()
    rig.add("r", (1, 2, 3))
    rig.engine.abort("r")
    assert rig.engine.has_work
    rig.step()
    assert rig.told(Finished)[0].reason == "abort" and not rig.engine.has_work


def test_a_negative_depth_is_refused():
    rig = Rig()
    with pytest.raises(ValueError, match="pipeline_depth=-1"):
        Engine(rig.scheduler, rig.runner, rig.clock, Ledger(1), -1)


def test_clocks_do_not_go_back():
    clock = VirtualClock(2.0)
    clock.advance(1.5)
    clock.advance_to(1.0)
    assert clock.now() == 3.5
    with pytest.raises(ValueError, match="seconds=-1"):
        clock.advance(-1)
    real = MonotonicClock()
    assert real.now() <= real.now()
