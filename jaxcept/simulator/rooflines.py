"""Cost models of devices that nobody here has: published profiles where there are any, data sheets where not.

    python -m jaxcept.simulator.rooflines    # writes cost_models/*.json

Nothing is fitted to an outcome. Assumptions are named, here and in `CostModel.sources`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxcept.scheduler.costs import CostModel

FOLDER = Path(__file__).parent / "cost_models"

# Assumptions: what dense kernels reach of the data sheet's figures.
COMPUTE_EFFICIENCY = 0.6
BANDWIDTH_EFFICIENCY = 0.8
ALL_REDUCE_LATENCY_S = 10e-6  # assumption: a small all-reduce over NVLink
SWAP_LATENCY_S = 20e-6  # assumption: to launch one transfer
VERSIONS = {"roofline": "1"}
PAPER = "InferCept (arXiv 2402.01869), constants profiled in its public code"


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Experts that stand in for one MLP."""

    num_experts: int
    num_per_token: int
    num_params: int  # of one expert, all layers

    def expected_experts(self, tokens: int) -> float:
        """How many a layer's tokens meet, where each token's are any, evenly and apart from the others' (assumed)."""
        return self.num_experts * (1 - (1 - self.num_per_token / self.num_experts) ** tokens)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a model's configuration says."""

    name: str
    num_params: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype_bytes: int = 2
    kv_element_bytes: float | None = None  # None is dtype_bytes
    experts: ExpertShape | None = None
    attended_share: float = 1.0  # of a context that a layer reads, the mean over layers with windows and without

    @property
    def active_params(self) -> int:
        """Parameters that one token meets."""
        if self.experts is None:
            return self.num_params
        idle = self.experts.num_experts - self.experts.num_per_token
        return self.num_params - idle * self.experts.num_params

    def read_bytes(self, tokens: int) -> float:
        """Of the parameters that so many tokens meet together."""
        if self.experts is None:
            return self.weight_bytes
        idle = self.experts.num_experts - self.experts.expected_experts(tokens)
        return (self.num_params - idle * self.experts.num_params) * self.dtype_bytes

    @property
    def weight_bytes(self) -> int:
        """Of all parameters."""
        return self.num_params * self.dtype_bytes

    @property
    def kv_token_bytes(self) -> int:
        """KV cache of one token, all layers."""
        return round(2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_element_size)

    @property
    def kv_element_size(self) -> float:
        """Bytes of one number of a key or a value."""
        return self.dtype_bytes if self.kv_element_bytes is None else self.kv_element_bytes


@dataclass(frozen=True, slots=True)
class DeviceSheet:
    """What a device's data sheet says; bytes and operations per second."""

    name: str
    memory_bytes: float
    flops: float  # dense, 16-bit
    bandwidth: float
    peer_bandwidth: float  # between devices, one direction


GPTJ_6B = ModelShape("gptj-6b", 6_050_882_784, 28, 4096, 16, 16, 256)
VICUNA_13B = ModelShape("vicuna-13b", 13_015_864_320, 40, 5120, 40, 40, 128)
LLAMA_3_70B = ModelShape("llama-3-70b", 70_553_706_496, 80, 8192, 64, 8, 128)
LLAMA_31_8B = ModelShape("llama-3.1-8b", 8_030_261_248, 32, 4096, 32, 8, 128)

A100_80GB = DeviceSheet("A100-SXM4-80GB", 80e9, 312e12, 2039e9, 300e9)
A100_40GB = DeviceSheet("A100-SXM4-40GB", 40e9, 312e12, 1555e9, 300e9)


@dataclass(frozen=True, slots=True)
class Profile:
    """A published profile: T_fwd(n) = base_s + n * token_s, the saturation point S and the swap budget N(S)."""

    base_s: float
    token_s: float
    saturation_tokens: int
    budget_tokens: int

    @property
    def swap_token_s(self) -> float:
        """Seconds per token of a swap: T_fwd(S) / N(S). N is published as an integer: the middle of its interval."""
        return (self.base_s + self.saturation_tokens * self.token_s) / (self.budget_tokens + 0.5)


GPTJ_PROFILE = Profile(10e-3, 0.0463e-3, 384, 605)
VICUNA_X2_PROFILE = Profile(15.4e-3, 0.0279e-3, 384, 319)


def from_profile(name: str, model: ModelShape, device: str, profile: Profile) -> CostModel:
    """The published linear model: time in tokens alone, attention included in none of its constants."""
    linear = f"{PAPER}: T_fwd(n) = {profile.base_s * 1e3:g} ms + n * {profile.token_s * 1e3:g} ms"
    zero = "0: the published model is linear in tokens alone"
    swap = f"{PAPER}: T_fwd({profile.saturation_tokens}) / N, N = {profile.budget_tokens} tokens, both directions alike"
    return CostModel(
        name=name,
        device=device,
        model=model.name,
        dtype="float16",
        overhead_s=profile.base_s,
        floor_s=0.0,
        token_s=profile.token_s,
        context_token_s=0.0,
        pair_s=0.0,
        saturation_tokens=profile.saturation_tokens,
        kv_token_bytes=model.kv_token_bytes,
        swap_out_latency_s=0.0,
        swap_out_token_s=profile.swap_token_s,
        swap_in_latency_s=0.0,
        swap_in_token_s=profile.swap_token_s,
        sources={
            "overhead_s": linear,
            "floor_s": zero,
            "token_s": linear,
            "context_token_s": zero,
            "pair_s": zero,
            "saturation_tokens": PAPER,
            "kv_token_bytes": f"2 * layers * KV heads * head size * {model.kv_element_size:g} bytes, from the model's"
            " configuration",
            "swap_out_latency_s": "0: the published budget has none",
            "swap_out_token_s": swap,
            "swap_in_latency_s": "0: the published budget has none",
            "swap_in_token_s": swap,
        },
        versions=VERSIONS,
    )


def step_overhead_s() -> float:
    """Seconds of a step that the roofline does not explain: what GPT-J's published base leaves over its weights' read.

    Host, launches, sampling and norms, taken to be the same for every model.
    """
    return GPTJ_PROFILE.base_s - GPTJ_6B.weight_bytes / (A100_80GB.bandwidth * BANDWIDTH_EFFICIENCY)


def from_roofline(
    name: str,
    model: ModelShape,
    device: DeviceSheet,
    num_devices: int,
    tokens: int = GPTJ_PROFILE.saturation_tokens,
) -> CostModel:
    """Tensor parallel over num_devices: a step reads its weights or is bound by its operations, and attends besides.

    Its weights are all of them; or, of a model with experts, those that a step of so many `tokens` meets.
    """
    flops = device.flops * COMPUTE_EFFICIENCY * num_devices
    bandwidth = device.bandwidth * BANDWIDTH_EFFICIENCY * num_devices
    num_reduces = 2 * model.num_layers if num_devices > 1 else 0
    reduced_bytes = 2 * (num_devices - 1) / num_devices * model.hidden_size * model.dtype_bytes
    peer_bandwidth = device.peer_bandwidth * BANDWIDTH_EFFICIENCY
    swap_token_s = model.kv_token_bytes / (GPTJ_6B.kv_token_bytes / GPTJ_PROFILE.swap_token_s)
    sheet = (
        f"{device.name} x {num_devices}, data sheet: {device.flops / 1e12:g} TFLOP/s, {device.bandwidth / 1e9:g} GB/s"
    )
    reaches = f"assumed reach: {COMPUTE_EFFICIENCY:.0%} of the operations, {BANDWIDTH_EFFICIENCY:.0%} of the bandwidth"
    windowed = "" if model.attended_share == 1 else f", the {model.attended_share:.0%} of it within the windows"
    link = "10.0 GB/s, the link of the published GPT-J profile, for all devices together as in that of Vicuna-13B x 2"
    return CostModel(
        name=name,
        device=device.name if num_devices == 1 else f"{num_devices}x {device.name}",
        model=model.name,
        dtype="bfloat16",
        overhead_s=step_overhead_s() + num_reduces * ALL_REDUCE_LATENCY_S,
        floor_s=model.read_bytes(tokens) / bandwidth,
        token_s=2 * model.active_params / flops + num_reduces * reduced_bytes / peer_bandwidth,
        context_token_s=model.attended_share * model.kv_token_bytes / bandwidth,
        pair_s=model.attended_share * 4 * model.num_layers * model.num_heads * model.head_dim / flops,
        saturation_tokens=GPTJ_PROFILE.saturation_tokens,
        kv_token_bytes=model.kv_token_bytes,
        swap_out_latency_s=SWAP_LATENCY_S,
        swap_out_token_s=swap_token_s,
        swap_in_latency_s=SWAP_LATENCY_S,
        swap_in_token_s=swap_token_s,
        sources={
            "overhead_s": "what the published GPT-J profile (10 ms) leaves over the read of its weights, and"
            f" {num_reduces} all-reduces of {ALL_REDUCE_LATENCY_S * 1e6:g} us (assumed)",
            "floor_s": f"read of {_what_is_read(model, tokens)}; {sheet}; {reaches}",
            "token_s": f"2 operations a parameter{' that a token meets' if model.experts else ''}, and the all-reduces'"
            f" bytes at {device.peer_bandwidth / 1e9:g} GB/s a direction; {sheet}; {reaches}",
            "context_token_s": f"read of a token's KV{windowed}; {sheet}; {reaches}",
            "pair_s": f"4 * layers * heads * head size operations{windowed}; {sheet}; {reaches}",
            "saturation_tokens": f"{PAPER}: 384 for both models that it gives, taken over; the roofline alone bends at"
            f" {model.read_bytes(tokens) / bandwidth / (2 * model.active_params / flops):.0f}",
            "kv_token_bytes": f"2 * layers * KV heads * head size * {model.kv_element_size:g} bytes, from the model's"
            " configuration",
            "swap_out_latency_s": "assumed",
            "swap_out_token_s": link,
            "swap_in_latency_s": "assumed",
            "swap_in_token_s": link,
        },
        versions=VERSIONS,
    )


def _what_is_read(model: ModelShape, tokens: int) -> str:
    if model.experts is None:
        return "all weights"
    met = model.experts.expected_experts(tokens)
    return (
        f"all weights but those of experts that no token meets: {met:.1f} of {model.experts.num_experts} are met by"
        f" {tokens} tokens, if each token's are any, evenly and apart from the others' (assumed)"
    )


def cost_models() -> dict[str, CostModel]:
    """All that ship, by name."""
    profiles = {
        "gptj-6b@a100": (GPTJ_6B, "A100-SXM4-80GB", GPTJ_PROFILE),
        "vicuna-13b@2xa100": (VICUNA_13B, "2x A100-SXM4-80GB", VICUNA_X2_PROFILE),
    }
    rooflines = {
        "gptj-6b@a100-roofline": (GPTJ_6B, A100_80GB, 1),
        "vicuna-13b@a100": (VICUNA_13B, A100_80GB, 1),
        "vicuna-13b@2xa100-roofline": (VICUNA_13B, A100_80GB, 2),
        "llama-3-70b@4xa100": (LLAMA_3_70B, A100_80GB, 4),
        "llama-3.1-8b@a100": (LLAMA_31_8B, A100_80GB, 1),
    }
    models = {name: from_profile(name, *rest) for name, rest in profiles.items()}
    return models | {name: from_roofline(name, *rest) for name, rest in rooflines.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for _name, _model in cost_models().items():
        _model.save(FOLDER / f"{_name}.json")
