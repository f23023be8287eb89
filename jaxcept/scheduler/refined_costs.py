"""A cost model that learns from the steps it predicted."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from jaxcept.scheduler.costs import Costs, StepLoad

RATE = 0.02  # weight of a new step in the correction
MAX_DEVIATION = 0.5  # natural log: a step further off than this counts as this far off
WINDOW = 256  # steps whose errors are remembered


class RefinedCosts:
    """Predictions of a cost model times one factor, which follows the steps that were measured.

    The factor moves in its logarithm by `RATE` of how far a step was off, by more while few were seen (their mean). A
    pause of the host, however long, moves it no more than any step that is off by exp(MAX_DEVIATION). Swaps run on a
    link of their own: their seconds are the model's.
    """

    def __init__(self, model: Costs) -> None:
        self.model = model
        self.num_observed = 0
        self._log_factor = 0.0
        self._factor = 1.0
        self._errors: deque[float] = deque(maxlen=WINDOW)

    @property
    def factor(self) -> float:
        """Seconds that steps take for each second that the model says."""
        return self._factor

    @property
    def saturation_tokens(self) -> int:
        """The model's."""
        return self.model.saturation_tokens

    @property
    def kv_token_bytes(self) -> int:
        """The model's."""
        return self.model.kv_token_bytes

    def observe(self, load: StepLoad, seconds: float) -> None:
        """How long a step took on the device. One without tokens, or without a duration, says nothing."""
        predicted = self.model.step_s(load)
        if not (predicted > 0 and 0 < seconds < math.inf):
            return
        self._errors.append(abs(self._factor * predicted - seconds) / seconds)
        self.num_observed += 1
        off = math.log(seconds / predicted) - self._log_factor
        off = max(-MAX_DEVIATION, min(MAX_DEVIATION, off))
        self._log_factor += off * max(RATE, 1 / self.num_observed)
        self._factor = math.exp(self._log_factor)

    @property
    def relative_error(self) -> float | None:
        """Median of |predicted - measured| / measured over the last steps, each predicted before it was measured."""
        return median(self._errors) if self._errors else None

    def step_s(self, load: StepLoad) -> float:
        """Seconds of a step, corrected."""
        return self._factor * self.model.step_s(load)

    def forward_s(self, num_tokens: int, num_context: int = 0) -> float:
        """Seconds of a step with one chunk, corrected."""
        return self._factor * self.model.forward_s(num_tokens, num_context)

    def swap_out_s(self, num_tokens: int) -> float:
        """The model's."""
        return self.model.swap_out_s(num_tokens)

    def swap_in_s(self, num_tokens: int) -> float:
        """The model's."""
        return self.model.swap_in_s(num_tokens)

    def hidden_tokens(self, seconds: float) -> int:
        """Most tokens that move either way within these seconds of a real clock."""
        return self.model.hidden_tokens(seconds)
