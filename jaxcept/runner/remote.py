"""The runner of an engine on several hosts: the first decides, and every host runs the same plans on its own devices.

A plan is what decides everything but one thing: when swaps are over, which each host sees at its own time. So a plan
travels with what the first host had seen of that when the plan was made, and the others wait until as much is over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxcept.runner.crew import Crew, HostLostError, Run, Stop
from jaxcept.runner.runner import DeviceRunner, Progress
from jaxcept.scheduler.plan import StepPlan, StepResult

LOSS_S = 5.0  # a collective that breaks is as a rule a host that is lost: who it is comes a moment later


class LeadRunner(DeviceRunner):
    """The first host's: hands every plan to the others before it obeys itself."""

    def __init__(self, crew: Crew, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._crew = crew

    def warm_up(self, progress: Progress | None = None, meet: Callable[[], None] | None = None) -> None:
        """Compiles, and waits until the others have. HostLostError where one never will."""
        super().warm_up(progress, meet or self._crew.meet)

    def submit(self, plan: StepPlan) -> None:
        """HostLostError where a host is gone."""
        self._crew.send(Run.of(plan, self.swapper.reported if self.swapper is not None else (None, None)))
        try:
            super().submit(plan)
        except Exception:
            self._crew.wait_for_loss(LOSS_S)
            raise

    def collect(self) -> StepResult:
        """HostLostError where a host is gone."""
        try:
            result = super().collect()
        except Exception:
            self._crew.wait_for_loss(LOSS_S)
            raise
        self._crew.require_all()
        return result


def obey(runner: DeviceRunner, crew: Crew) -> None:
    """Another host's: runs what comes until the first host is done. HostLostError where that one is lost.

    RuntimeError where something fails here alone, such as a swap, of which the first host cannot know.
    """
    while True:
        message = crew.receive()
        if isinstance(message, Stop):
            return
        if not isinstance(message, Run):
            raise HostLostError(f"host 0 sent {type(message).__name__}, expected plans")
        runner.follow(message.plan, message.swaps_over)
