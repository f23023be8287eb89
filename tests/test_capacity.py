"""What `jaxcept plan` says, against compiled programs and against published sizes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from checkpoints import build_checkpoint

from jaxcept.capacity import Plan, Sizes, default_max_model_len, model_shape, parse_devices, plan_capacity
from jaxcept.runner.memory import DEVICE_SHARE
from jaxcept.runner.runner import DeviceRunner, RunnerConfig
from jaxcept.simulator.rooflines import (
    A100_80GB,
    GPTJ_6B,
    LLAMA_3_70B,
    LLAMA_31_8B,
    VICUNA_13B,
    ExpertShape,
    from_roofline,
)
from jaxcept_kernels.attention import Implementation
from jaxcept_models.config import ModelConfig
from jaxcept_models.footprint import Footprint, num_params
from jaxcept_models.model import load_model
from jaxcept_models.shapes import SHAPES
from jaxcept_models.sharding import make_mesh, share
from jaxcept_serve.cli import main

COMPILED = Path(__file__).parent.parent / "benchmarks" / "results" / "gpu-offline.json"
BFLOAT16 = jnp.dtype(jnp.bfloat16)
SIZES = Sizes(256, 2048, 4096)


def footprint(model: str, num_devices: int, implementation: str = "pallas", data: int = 1) -> Footprint:
    """`model` is a name, or "name, dtype KV" as compiled programs are told apart."""
    name, _, kv = model.partition(", ")
    config, dtype = SHAPES[name], jnp.dtype(kv.removesuffix(" KV")) if kv else None
    return Footprint(config, share(config, num_devices, data), BFLOAT16, Implementation(implementation), dtype)


def head_bytes(here: Footprint) -> int:
    """The matrix of the logits, and a bias: no argument of a step, unless the embedding is that matrix."""
    part: ModelConfig = here.part
    if part.tie_word_embeddings:
        return 0
    has_bias = part.architecture == "GPTJForCausalLM"
    return (part.hidden_size + has_bias) * part.vocab_size * 2


def compiled() -> list[Any]:
    """Models' steps and draws as they were compiled for GPUs; kernels by themselves have no model."""
    rows = [row for row in json.loads(COMPILED.read_text()) if row["model"].partition(", ")[0] in SHAPES]
    return [
        pytest.param(row, id="-".join(str(row[key]) for key in ("jax", "target", "model", "num_devices", "what")))
        for row in rows
        if row["what"].startswith(("step 1024", "sample 128 full"))
        and row["num_layers"] == SHAPES[row["model"].partition(", ")[0]].num_layers
    ]


@pytest.mark.parametrize("row", compiled())
def test_bytes_are_those_of_the_compiled_program(row: dict[str, Any]) -> None:
    what, tokens, *_, implementation = row["what"].split()
    here = footprint(row["model"], row["num_devices"], implementation)
    peak = row["argument_bytes"] + row["output_bytes"] - row["alias_bytes"] + row["temp_bytes"]
    if what == "sample":
        # Of a vocabulary that is shared XLA may add up a logit from parts, up to four, which then lie beside.
        parts = 4 * 4 * int(tokens) * here.part.vocab_size if here.parallel.splits_vocabulary else 0
        assert 0.97 * row["temp_bytes"] - parts < here.draw_bytes(int(tokens)) < 1.03 * row["temp_bytes"]
        return
    assert row["alias_bytes"] == row["pool_bytes"] > 0 and row["pool_bytes"] % here.block_bytes(16) == 0
    ours = here.weight_bytes - head_bytes(here) + row["pool_bytes"] + here.step_bytes(int(tokens))
    assert ours + here.result_bytes(int(tokens), 128) == pytest.approx(peak, rel=0.03)
    # Hardly more than estimated: memory that was promised is there.
    assert row["temp_bytes"] < 1.15 * here.step_bytes(int(tokens))


def test_the_compiled_programs_cover_several_devices() -> None:
    seen = {(param.values[0]["model"], param.values[0]["num_devices"]) for param in compiled()}
    assert {("gpt-j-6b", 1), ("llama-3-8b", 1), ("llama-3-70b", 4), ("vicuna-13b", 1), ("vicuna-13b", 2)} <= seen
    assert ("llama-3-70b, int8 KV", 4) in seen
    assert {("qwen3-30b-a3b", 1), ("qwen3-30b-a3b", 4), ("mixtral-8x7b", 2)} <= seen
    assert {("gemma-2-9b", 1), ("gemma-3-27b", 2)} <= seen


@pytest.mark.parametrize(
    ("model", "published"),
    [("gpt-j-6b", GPTJ_6B), ("vicuna-13b", VICUNA_13B), ("llama-3-8b", LLAMA_31_8B), ("llama-3-70b", LLAMA_3_70B)],
)
def test_parameters_are_the_published_ones(model: str, published: Any) -> None:
    assert num_params(SHAPES[model]) == published.num_params
    assert footprint(model, 1).block_bytes(1) == published.kv_token_bytes


@pytest.mark.parametrize(
    ("model", "published", "active"),
    # The bytes of the published bfloat16 checkpoints, halved; "3.3B activated" and "12.9B" of the models' cards.
    [("qwen3-30b-a3b", 61_064_245_248 // 2, 3.3e9), ("mixtral-8x7b", 93_405_585_408 // 2, 12.9e9)],
)
def test_parameters_with_experts_are_the_published_ones(model: str, published: int, active: float) -> None:
    shape = model_shape(model, footprint(model, 1), 16, 2048)
    assert shape.num_params == num_params(SHAPES[model]) == published
    assert shape.active_params == pytest.approx(active, rel=0.02)
    assert shape.read_bytes(1) == pytest.approx(2 * shape.active_params)
    assert shape.read_bytes(10_000) == pytest.approx(shape.weight_bytes)


@pytest.mark.parametrize(("model", "published"), [("gemma-2-9b", 9_241_705_984), ("gemma-3-27b", 27_009_346_304)])
def test_layers_with_windows_read_less_than_the_context(model: str, published: int) -> None:
    config = SHAPES[model]
    assert num_params(config) == published
    short, long = (model_shape(model, footprint(model, 1), 16, context) for context in (512, 32_768))
    assert short.attended_share == 1
    full, window = config.windows.count(None), config.windows[0]
    assert window is not None
    part = (full + (config.num_layers - full) * window / 32_768) / config.num_layers
    assert long.attended_share == pytest.approx(part)
    whole, cut = (from_roofline(model, shape, A100_80GB, 1) for shape in (short, long))
    assert cut.context_token_s == pytest.approx(part * whole.context_token_s)
    assert cut.kv_token_bytes == whole.kv_token_bytes, "every layer keeps the whole context"
    assert "within the windows" in cut.sources["pair_s"] and "within the windows" not in whole.sources["pair_s"]


@pytest.mark.parametrize(("tensor", "data"), [(1, 1), (4, 1), (8, 1), (2, 2)])
def test_a_loaded_model_takes_what_was_planned(tmp_path: Path, tensor: int, data: int) -> None:
    saved = build_checkpoint("llama31", tmp_path, num_attention_heads=8, num_hidden_layers=1)
    model = load_model(saved, dtype="float32", mesh=make_mesh(tensor, data))
    here = Footprint(model.config, share(model.config, tensor, data), model.dtype, model.implementation)
    assert here.weight_bytes == sum(weight.addressable_shards[0].data.nbytes for weight in model.weights)
    runner = DeviceRunner(model, RunnerConfig(8, 16, 4, 16, 64))
    assert 8 * here.block_bytes(16) == sum(part.addressable_shards[0].data.nbytes for part in runner._pool)


def plan(model: str, devices: str, data: int = 1, **changes: Any) -> Plan:
    sizes = {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "max_model_len": 2048} | changes
    return plan_capacity(model, devices, data, Sizes(**sizes))


def test_memory_adds_up_and_more_devices_hold_more() -> None:
    one, two = (plan("vicuna-13b", devices).memory for devices in ("A100-80GB", "2xA100-80GB"))
    for memory in (one, two):
        taken = memory.weight_bytes + memory.workspace_bytes + memory.staging_bytes + memory.pool_bytes
        assert 0 <= memory.usable_bytes - taken < memory.block_bytes
        assert memory.usable_bytes == 0.9 * 0.95 * 80e9 and memory.num_tokens == 16 * memory.num_blocks
    assert two.block_bytes * 2 == one.block_bytes
    assert two.num_tokens > 2.5 * one.num_tokens
    spread = plan("llama-3-70b", "16xA100-80GB").memory  # eight KV heads: each on two devices
    assert spread.block_bytes == plan("llama-3-70b", "8xA100-80GB").memory.block_bytes


def test_eight_bits_hold_almost_twice_as_much_and_move_in_half_the_time() -> None:
    sizes = Sizes(256, 2048, 2048)
    wide, narrow = (plan_capacity("llama-3-70b", "4xa100-80gb", 1, sizes, kv_cache_dtype=kv) for kv in ("auto", "int8"))
    assert narrow.memory.block_bytes / wide.memory.block_bytes == 17 / 32
    assert 1.85 < narrow.memory.num_tokens / wide.memory.num_tokens < 32 / 17 + 0.02
    assert 1.8 < narrow.swap_tokens_per_step / wide.swap_tokens_per_step < 1.95
    assert narrow.swap_context_s / wide.swap_context_s == pytest.approx(17 / 32, rel=0.03)
    assert narrow.memory.weight_bytes == wide.memory.weight_bytes


def test_a_pool_is_never_of_a_size_that_kernels_address_wrongly() -> None:
    here, block = footprint("llama-3-8b, int8 KV", 1), 17 * 128 * 8 * 32  # elements of K
    for wanted in (1, (1 << 31) // block, (1 << 32) // block + 1, 100_000):
        assert here.addressable_blocks(wanted, 16) == wanted
    for wanted in ((1 << 31) // block + 1, (1 << 32) // block):
        assert here.addressable_blocks(wanted, 16) == (1 << 31) // block
        assert footprint("llama-3-8b", 1).addressable_blocks(wanted, 16) == wanted
        assert footprint("llama-3-8b, int8 KV", 1, "xla").addressable_blocks(wanted, 16) == wanted


def test_a_command_has_the_share_of_a_gpu_that_plans_count_on(monkeypatch: pytest.MonkeyPatch) -> None:
    old, name = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"
    command = ["plan", "gpt-j-6b", "--devices", "a100-80gb", "--json"]
    monkeypatch.setenv(old, "0.5")
    monkeypatch.setenv(name, "to be restored")
    monkeypatch.delenv(name)
    assert main(command) == 0 and os.environ[old] == "0.5" and name not in os.environ
    monkeypatch.delenv(old)
    assert main(command) == 0 and float(os.environ[name]) == DEVICE_SHARE
    monkeypatch.setenv(name, "0.7")
    assert main(command) == 0 and os.environ[name] == "0.7"


def test_groups_shorten_steps_and_hold_no_more() -> None:
    one, groups = plan("llama-3-8b", "2xH100-80GB"), plan("llama-3-8b", "4xh100-80gb", 2)
    assert (groups.tensor, groups.data) == (2, 2)
    assert groups.memory.weight_bytes == one.memory.weight_bytes
    assert groups.memory.num_tokens == pytest.approx(one.memory.num_tokens, rel=0.01)
    assert groups.steps[-1].what == "prefill" and groups.steps[-1].seconds < 0.6 * one.steps[-1].seconds


def test_a_decode_reads_the_weights_and_contexts_once() -> None:
    alone = plan("llama-3-8b", "a100-80gb").steps
    weights = 2 * num_params(SHAPES["llama-3-8b"])
    assert alone[0].what == "decode" and alone[0].tokens == 1
    assert alone[0].seconds > weights / A100_80GB.bandwidth
    assert alone[1].seconds < 1.1 * alone[0].seconds  # eight sequences cost little more than one
    assert [step.fits for step in alone] == [step.context_tokens <= plan("llama-3-8b", "a100-80gb").memory.num_tokens
                                             for step in alone]  # fmt: skip


def test_few_tokens_read_few_experts() -> None:
    experts = ExpertShape(128, 8, 1)
    assert experts.expected_experts(1) == pytest.approx(8)
    assert experts.expected_experts(2) == pytest.approx(8 + 8 * 120 / 128)
    steps = {step.tokens: step.seconds for step in plan("qwen3-30b-a3b", "1xa100-80gb").steps}
    dense = {step.tokens: step.seconds for step in plan("llama-3-8b", "1xa100-80gb").steps}
    assert steps[1] < dense[1] < steps[32]  # 3.4e9 of 30.5e9 parameters, then most of them
    groups = {step.tokens: step.seconds for step in plan("qwen3-30b-a3b", "2xa100-80gb", 2).steps}
    assert groups[8] < steps[8]


@pytest.mark.parametrize(
    ("model", "devices", "data", "message"),
    [
        ("llama-3-70b", "A100-80GB", 1, "llama-3-70b does not fit 1 x A100-SXM4-80GB: weights take 141.1 GB"),
        ("llama-3-70b", "3xA100-80GB", 1, "tensor=3: .*sizes that work: 1, 2, 4, 8, 16, 32, 64"),
        ("llama-3-70b", "4xA100", 1, "devices=4xA100: expected a number, x and one of a100-40gb"),
        ("llama-3-70b", "0xA100-80GB", 1, "devices=0xA100-80GB"),
        ("llama-3-70b", "4xA100-80GB", 3, "data=3: expected a divisor of the 4 devices"),
    ],
)
def test_what_cannot_be_is_refused(model: str, devices: str, data: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(model, devices, data)


def test_devices_are_parsed() -> None:
    assert parse_devices("4xA100-80GB") == (4, A100_80GB) and parse_devices(" a100-80gb ") == (1, A100_80GB)
    assert default_max_model_len("gpt-j-6b") == 2048 and default_max_model_len("llama-3-8b") == 4096
    with pytest.raises(ValueError, match="context=0"):
        Sizes(1, 1, 1, context=0)


def test_the_command_prints_tables_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["plan", "llama-3-70b", "--devices", "4xA100-80GB"]) == 0
    text = capsys.readouterr().out
    assert "llama-3-70b, 70.55e9 parameters, on 4 x A100-SXM4-80GB (tensor 4, data 1)" in " ".join(text.split())
    assert "35.28" in text and "Swap budget" in text and "experts" not in text
    assert main(["plan", "mixtral-8x7b", "--devices", "2xA100-80GB"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "46.70e9 parameters (12.88e9 for each token)" in text and "A step reads the experts that" in text
    saved = build_checkpoint("gptj", tmp_path)
    assert main(["plan", str(saved), "--devices", "h200-141gb", "--json", "--max-model-len", "512"]) == 0
    told = json.loads(capsys.readouterr().out)
    memory = told["memory"]
    assert told["pool_bytes"] == memory["num_blocks"] * memory["block_bytes"] > 0.8 * memory["usable_bytes"]
    assert [step["what"] for step in told["steps"]].count("decode") == 6
    assert main(["plan", "nothing-13b", "--devices", "h200-141gb"]) == 2
    assert "neither a folder with config.json nor one of gpt-j-6b" in capsys.readouterr().err
