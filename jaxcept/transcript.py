"""One completion as text: what the model generated and what tools returned, run by run."""

from __future__ import annotations

from jaxcept.outputs import CallRecord, CompletionOutput, Interception, Segment
from jaxcept.scheduler.events import Finished
from jaxcept.scheduler.plan import TokenLogprobs
from jaxcept.watcher import TextWatcher


class Transcript:
    """Collects one sequence's runs of ids and text; `finish` makes the completion of them."""

    def __init__(self, index: int, watcher: TextWatcher) -> None:
        self.index = index
        self.watcher = watcher
        self.calls: dict[int, tuple[CallRecord, ...]] = {}  # by number of the interception
        self._segments: list[Segment] = []
        self._texts: list[str] = []  # of the current run of generated tokens
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def generated(self, token_id: int, logprobs: TokenLogprobs | None) -> str:
        """Takes a generated token that the watcher has seen; the text that may be sent for it."""
        self._ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        return self._take_generated()

    def returned(self) -> tuple[str, Segment]:
        """After tokens were returned: (generated text that was held back, what was returned)."""
        held_back = self._take_generated()
        self._close_run()
        run = self.watcher.take_returned()
        segment = Segment("returned", run.text, run.returned_ids or ())
        if segment.token_ids:
            self._segments.append(segment)
        return held_back, segment

    @property
    def since_return(self) -> str:
        """Text generated since the last return."""
        return "".join(self._texts)

    def finish(self, event: Finished) -> tuple[str, CompletionOutput]:
        """The text that was held back, and the completion."""
        held_back = self._take_generated()
        self._close_run()
        generated = [segment for segment in self._segments if segment.kind == "generated"]
        output = CompletionOutput(
            index=self.index,
            text="".join(segment.text for segment in generated),
            token_ids=[token_id for segment in generated for token_id in segment.token_ids],
            logprobs=self._logprobs or None,
            finish_reason=event.reason.value,
            stop_reason=event.stop_reason,
            segments=self._segments,
            interceptions=[self._interception(record.index, event) for record in event.interceptions],
            tells_thoughts=self.watcher.tells_thoughts,
        )
        return held_back, output

    def _take_generated(self) -> str:
        text = self.watcher.take_generated()
        if text:
            self._texts.append(text)
        return text

    def _close_run(self) -> None:
        if self._ids or any(self._texts):
            self._segments.append(Segment("generated", "".join(self._texts), tuple(self._ids)))
        self._texts, self._ids = [], []

    def _interception(self, index: int, event: Finished) -> Interception:
        record = event.interceptions[index]
        return Interception(
            index=record.index,
            trigger=record.tool,
            calls=self.calls.get(record.index, ()),
            start_s=record.started_at - event.timing.arrival,
            duration_s=record.duration_s,
            residency=record.residency.value,
            context_tokens=record.context_tokens,
            num_recomputed=record.num_recomputed,
            num_returned=record.num_returned,
            outcome=record.outcome.value,
        )
