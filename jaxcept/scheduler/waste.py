"""Waste: device memory held x time without use, in byte-seconds, as InferCept (arXiv 2402.01869) defines it.

C: context tokens of the intercepted sequence; C_other: those of the other running sequences; M: bytes of KV of a token.
"""

from __future__ import annotations

from jaxcept.scheduler.costs import Costs


def discard_waste(costs: Costs, num_tokens: int, other_tokens: int) -> float:
    """T_fwd(C)·C·M + T_fwd(C)·C_other·M, the context recomputed in one step in which all others wait."""
    return costs.forward_s(num_tokens) * (num_tokens + other_tokens) * costs.kv_token_bytes


def chunked_discard_waste(costs: Costs, num_tokens: int, other_tokens: int, num_chunks: int) -> float:
    """T_fwd(C)·C·M / 2 + n·T_fwd(C/n)·C_other·M: recomputed in n chunks, its memory fills up step by step.

    T_fwd(C/n) is that of the middle chunk, behind half of what stands before the last one: the mean of all n, for a
    step's time grows linearly with the context.
    """
    if not num_tokens:
        return 0.0
    size = -(-num_tokens // num_chunks)
    own = costs.forward_s(num_tokens) * num_tokens / 2
    others = num_chunks * costs.forward_s(size, (num_tokens - size) // 2) * other_tokens
    return (own + others) * costs.kv_token_bytes


def preserve_waste(costs: Costs, num_tokens: int, seconds: float) -> float:
    """T_INT·C·M, the context held until the tool returns."""
    return seconds * num_tokens * costs.kv_token_bytes


def swap_waste(costs: Costs, num_tokens: int, batch_tokens: int) -> float:
    """2·T_swap(C)·C_batch·M, out and back while the whole batch waits."""
    return (costs.swap_out_s(num_tokens) + costs.swap_in_s(num_tokens)) * batch_tokens * costs.kv_token_bytes


def num_chunks(costs: Costs, num_tokens: int, num_decodes: int) -> int:
    """Chunks of S - decode tokens that recompute a context; at least a sixteenth of S goes into each."""
    size = max(costs.saturation_tokens - num_decodes, costs.saturation_tokens // 16, 1)
    return max(1, -(-num_tokens // size))


def break_even_s(costs: Costs, num_tokens: int, other_tokens: int, num_decodes: int = 0) -> float:
    """How long a tool must take for giving up (in chunks) to waste as little as holding, for a context of 1 or more."""
    chunks = num_chunks(costs, num_tokens, num_decodes)
    given_up = chunked_discard_waste(costs, num_tokens, other_tokens, chunks)
    return given_up / (num_tokens * costs.kv_token_bytes)
