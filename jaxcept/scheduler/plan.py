"""The page both towers read: what one step computes, and what came of it. Plain values, no clock, no arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from jaxcept.scheduler.params import SamplingParams


class ChunkKind(StrEnum):
    """Why a run of known tokens is computed; for the ledger alone, the runner treats all alike."""

    PREFILL = "prefill"
    RECOMPUTE = "recompute"  # tokens whose KV was computed before and given up
    RETURNED = "returned"  # tokens that a tool returned
    DRAFT = "draft"  # the token drawn last, and guesses of those that follow it


class Decodes(NamedTuple):
    """Sequences that compute the one token they sampled last, which is still on the device. Columns, equal lengths.

    `positions[i]` is where that token stands in its sequence; its KV goes there. Each entry samples the next token.
    """

    seq_ids: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()


class Chunk(NamedTuple):
    """A run of known tokens of one sequence: positions start .. start + len(token_ids) - 1.

    The last `num_drafts` are guesses. A token is drawn behind each of them, and behind the one before them.
    """

    seq_id: int
    row: int
    kind: ChunkKind
    start: int
    token_ids: tuple[int, ...]
    samples: bool  # whether the token after the last one is drawn
    num_recomputed: int = 0  # how many of these had their KV computed before
    num_drafts: int = 0

    @property
    def num_draws(self) -> int:
        """Tokens that are drawn, in the order of their positions."""
        return 1 + self.num_drafts if self.samples else 0


class TableUpdate(NamedTuple):
    """block_ids stand at offset, offset + 1, … of the row's block table from this step on."""

    row: int
    offset: int
    block_ids: tuple[int, ...]


class RowSetup(NamedTuple):
    """A sequence takes a row of the runner's per-row state (0 <= row < max_num_seqs); whoever had it is gone.

    `token_ids` are all ids known so far; `output_spans` the [start, stop) ranges of them that the model generated
    (presence and frequency penalties count these alone). `seed` is the sequence's own, already derived from the
    request's seed and the index of the completion.
    """

    row: int
    seq_id: int
    params: SamplingParams
    seed: int
    token_ids: tuple[int, ...]
    output_spans: tuple[tuple[int, int], ...]
    num_prompt: int
    stop_token_ids: tuple[int, ...]  # not drawn before params.min_tokens tokens are generated


class Mask(NamedTuple):
    """A draw of the row in this step is one of these tokens: bit i % 32 of the little-endian uint32 word i // 32 for
    token i; ids past the end of `bits` are not drawn."""

    row: int
    bits: bytes
    draw: int = 0  # which of the row's draws, in their order


class MoveKind(StrEnum):
    """Where a block's content goes; in a plan the kinds stand in this order."""

    SWAP_OUT = "swap_out"  # device block src → host block dst; src may be written to in the same step
    LAND = "land"  # what a SWAP_IN of an earlier plan staged for device block dst is written there
    COPY = "copy"  # device block src → device block dst, for copy-on-write
    SWAP_IN = "swap_in"  # host block src → a staging area on the device, meant for device block dst


class BlockMove(NamedTuple):
    """One block's content moves from src to dst before the step computes.

    A swap is only started: the step does not wait for it unless `StepPlan.waits_for_swaps`. `StepResult` tells when it
    is over. A staged block lands in the first plan that is submitted after the result that told of its arrival, or
    never: the runner drops what does not land then.
    """

    kind: MoveKind
    src: int
    dst: int


class FailedMove(NamedTuple):
    """A swap that did not bring its block over: the transfer failed, or the content is not what was sent."""

    step_id: int  # of the plan that started it
    move: BlockMove


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The frozen input of one step. Moves first, then rows, then tables, then the batch: decodes, then chunks.

    A plan without tokens computes nothing: collecting it waits for the swap that is over next, if any is under way.
    """

    step_id: int
    decodes: Decodes
    chunks: tuple[Chunk, ...]
    tables: tuple[TableUpdate, ...]
    rows: tuple[RowSetup, ...]
    moves: tuple[BlockMove, ...]
    waits_for_swaps: bool = False  # whether the device finishes the swaps of this plan before it computes
    masks: tuple[Mask, ...] = ()  # of rows that draw in this step; any token may be drawn for the others

    @property
    def num_tokens(self) -> int:
        """Query tokens of the step."""
        return len(self.decodes.rows) + sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def sampling_seq_ids(self) -> tuple[int, ...]:
        """The sequences that draw tokens, in the order of StepResult.token_ids, as often as they draw."""
        return self.decodes.seq_ids + tuple(chunk.seq_id for chunk in self.chunks for _ in range(chunk.num_draws))


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, of the model's own distribution (temperature 1, before any filter)."""

    logprob: float  # of the token that stands there
    rank: int  # 1 is the most likely
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a plan. `token_ids` are aligned with plan.sampling_seq_ids.

    `logprobs` maps an index of token_ids to its log-probabilities, for the sequences that asked. `prompt_logprobs` maps
    an index of plan.chunks to one entry per token of the chunk: the log-probabilities of the token AFTER it, as far as
    it is known in the chunk's sequence; given for chunks of sequences that asked for prompt_logprobs.

    `outs_through` and `ins_through`: every SWAP_OUT (SWAP_IN) of the plans up to this step_id is over, None while none
    is. Those that failed are named once, in the result that first covers their plan.
    """

    step_id: int
    token_ids: tuple[int, ...]
    logprobs: Mapping[int, TokenLogprobs]
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]]
    outs_through: int | None = None
    ins_through: int | None = None
    failed: tuple[FailedMove, ...] = ()
