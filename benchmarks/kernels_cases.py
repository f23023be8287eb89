"""What benchmarks/kernels.py measures: shapes, sizes, and the least work that each call must do, by formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Shape:
    """The attention of a model, as one device sees it."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    layers: int

    @property
    def token_bytes(self) -> int:
        """Elements of K and V of one token in one layer; times the bytes of an element."""
        return 2 * self.kv_heads * self.head_dim


GPT_J = Shape("gpt-j-6b", 16, 16, 256, 28)
VICUNA = Shape("vicuna-13b", 40, 40, 128, 40)
LLAMA_8B = Shape("llama-3-8b", 32, 8, 128, 32)
LLAMA_70B = Shape("llama-3-70b/4", 16, 2, 128, 80)
SMALL = Shape("small", 4, 2, 32, 2)


class Prefill(NamedTuple):
    """A step that computes the last `chunk` tokens of each of some contexts."""

    sequences: int
    chunk: int
    context: int


class Work(NamedTuple):
    """The least that a call must do: each input read once, each output written once."""

    bytes: int
    flops: int = 0

    def floor_s(self, bandwidth: float, rate: float) -> float:
        """Seconds at these bytes and floating-point operations per second."""
        return max(self.bytes / bandwidth, self.flops / rate)


def attention_work(shape: Shape, step: Prefill, itemsize: int) -> Work:
    """Keys and values in reach once, queries and results once; two products of two operations per pair and value."""
    rows = step.sequences * step.chunk
    before = step.context - step.chunk
    pairs = step.sequences * (step.chunk * before + step.chunk * (step.chunk + 1) // 2)
    elements = step.sequences * step.context * shape.token_bytes + 2 * rows * shape.heads * shape.head_dim
    return Work(elements * itemsize, 4 * pairs * shape.heads * shape.head_dim)


def write_work(shape: Shape, tokens: int, itemsize: int) -> Work:
    """Keys and values of one layer, read and written."""
    return Work(2 * tokens * shape.token_bytes * itemsize)


def move_work(shape: Shape, blocks: int, block_size: int, itemsize: int) -> Work:
    """Whole blocks of all layers, read and written."""
    return Work(2 * blocks * block_size * shape.layers * shape.token_bytes * itemsize)


class EngineStep(NamedTuple):
    """A GPT-J whose step is timed: decodes at one context, or at half of it and so on where the pool does not fit."""

    shape: Shape
    vocab: int
    batches: tuple[int, ...]
    context: int

    @property
    def hidden(self) -> int:
        """Width of the model."""
        return self.shape.heads * self.shape.head_dim

    def weight_bytes(self, itemsize: int) -> int:
        """Weights that a step reads whole: all but the table of the embedding, of which it reads a row per token."""
        per_layer = 4 * self.hidden**2 + 2 * self.hidden * 4 * self.hidden + 5 * self.hidden + 2 * self.hidden
        head = self.hidden * self.vocab + self.vocab + 2 * self.hidden
        return (self.shape.layers * per_layer + head) * itemsize

    def work(self, batch: int, context: int, itemsize: int) -> Work:
        """Weights once; keys and values of every layer once. Two operations per weight and token, and the attention."""
        attention = attention_work(self.shape, Prefill(batch, 1, context), itemsize)
        kept = batch * context * self.shape.token_bytes * itemsize * self.shape.layers
        weights = self.weight_bytes(itemsize)
        flops = 2 * batch * weights // itemsize + attention.flops * self.shape.layers
        return Work(weights + kept, flops)


@dataclass(frozen=True, slots=True)
class Preset:
    """The sizes of one run. Cases that do not fit the device are left out and named."""

    shapes: tuple[Shape, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prefills: tuple[Prefill, ...]
    writes: tuple[int, ...]  # tokens
    moves: tuple[int, ...]  # blocks
    dtype: str
    block_size: int
    pool_bytes: int  # of the attention's pool, at most
    moved_pool_bytes: int  # of the pool whose blocks are moved
    copy_bytes: int  # of the array whose copy is the measure of bandwidth
    matrix: int  # width of the square product that is the measure of the matrix rate
    transfer_bytes: int  # of a swap beside a step
    step: EngineStep
    budget_s: float
    rounds: int = 5  # times are medians of so many
    round_s: float = 0.02  # least seconds of one

    def steps(self, section: str) -> tuple[Prefill, ...]:
        """The cases of section `decode` or `prefill`; a decode is a chunk of one token."""
        if section == "prefill":
            return self.prefills
        return tuple(Prefill(batch, 1, context) for batch in self.batches for context in self.contexts)


_CHUNKS = (Prefill(1, 2048, 2048), Prefill(1, 2048, 8192), Prefill(1, 2048, 32768), Prefill(1, 512, 512))
_SHARED = (Prefill(4, 512, 2048), Prefill(16, 128, 2048), Prefill(1, 512, 8192), Prefill(1, 128, 2048))
_GPU_SHAPES = (GPT_J, LLAMA_8B, LLAMA_70B, VICUNA)
GB = 1 << 30
MB = 1 << 20

PRESETS = {
    "tiny": Preset(
        shapes=(SMALL,),
        batches=(1, 3),
        contexts=(16, 64),
        prefills=(Prefill(1, 16, 32), Prefill(2, 8, 8)),
        writes=(4,),
        moves=(2,),
        dtype="float32",
        block_size=16,
        pool_bytes=MB,
        moved_pool_bytes=MB,
        copy_bytes=MB,
        matrix=64,
        transfer_bytes=64 << 10,
        step=EngineStep(Shape("small gpt-j", 4, 4, 32, 2), 256, (1, 4), 32),
        budget_s=120,
        rounds=2,
        round_s=0.001,
    ),
    "cpu": Preset(
        shapes=(LLAMA_8B, LLAMA_70B, GPT_J),
        batches=(1, 4),
        contexts=(128, 1024),
        prefills=(Prefill(1, 128, 128), Prefill(1, 128, 1024)),
        writes=(4, 128),
        moves=(4,),
        dtype="float32",
        block_size=16,
        pool_bytes=512 * MB,
        moved_pool_bytes=192 * MB,
        copy_bytes=256 * MB,
        matrix=1024,
        transfer_bytes=32 * MB,
        step=EngineStep(Shape("gpt-j of 8 layers", 8, 8, 64, 8), 8192, (1, 4, 16), 256),
        budget_s=300,
        rounds=3,
    ),
    "quick": Preset(
        shapes=(GPT_J, LLAMA_8B),
        batches=(1, 32, 128),
        contexts=(512, 2048, 8192),
        prefills=_CHUNKS[:2] + _SHARED[:1],
        writes=(32, 2048),
        moves=(8, 128),
        dtype="bfloat16",
        block_size=16,
        pool_bytes=20 * GB,
        moved_pool_bytes=4 * GB,
        copy_bytes=4 * GB,
        matrix=8192,
        transfer_bytes=GB,
        step=EngineStep(GPT_J, 50400, (1, 32), 1024),
        budget_s=150,
    ),
    "full": Preset(
        shapes=_GPU_SHAPES,
        batches=(32, 1, 128, 8, 256, 64),  # by what one wants to know first, should time run out
        contexts=(2048, 8192, 128, 512, 32768),
        prefills=_CHUNKS + _SHARED,
        writes=(1, 32, 256, 2048),
        moves=(1, 8, 32, 128),
        dtype="bfloat16",
        block_size=16,
        pool_bytes=72 * GB,
        moved_pool_bytes=8 * GB,
        copy_bytes=4 * GB,
        matrix=8192,
        transfer_bytes=2 * GB,
        step=EngineStep(GPT_J, 50400, (1, 32, 128), 1024),
        budget_s=510,
    ),
}
