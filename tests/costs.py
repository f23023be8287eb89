"""Round numbers for cost models, so that seconds and waste can be worked out by hand."""

from dataclasses import replace

from jaxcept.scheduler.costs import CostModel

# T_fwd(n) = 10 ms + 0.05 ms · n, T_swap(n) = 0.02 ms · n, S = 404 tokens, M = 1,000 bytes.
HAND = CostModel(
    name="hand",
    device="paper and pencil",
    model="none",
    dtype="float32",
    overhead_s=0.010,
    floor_s=0.0,
    token_s=0.00005,
    context_token_s=0.0,
    pair_s=0.0,
    saturation_tokens=404,
    kv_token_bytes=1000,
    swap_out_latency_s=0.0,
    swap_out_token_s=0.00002,
    swap_in_latency_s=0.0,
    swap_in_token_s=0.00002,
)
# Every token counts, as on a CPU: a waiting context's last, partly filled block is worth a copy.
SLOW = replace(HAND, token_s=0.001)
# The same device, with weights to read, attention, latency, and a slower way in.
FULL = replace(
    HAND,
    floor_s=0.005,
    context_token_s=1e-6,
    pair_s=1e-8,
    swap_out_latency_s=0.001,
    swap_in_latency_s=0.002,
    swap_in_token_s=0.00004,
    sources={"token_s": "by hand"},
    versions={"pencil": "2B"},
)
