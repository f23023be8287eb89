"""Weights out of Hugging Face folders: layouts, errors that name what is wrong, random weights, host memory."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, build_checkpoint
from safetensors.numpy import load_file, save_file

from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.linear import pack_weight
from jaxcept_models.config import read_config
from jaxcept_models.errors import CheckpointError
from jaxcept_models.model import Model, load_model, stored_parts

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("qwen25", tmp_path_factory.mktemp("qwen"), tie_word_embeddings=False)


@pytest.fixture
def folder(qwen: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(qwen, tmp_path / "model"))


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def equal(a: Model, b: Model) -> bool:
    return a.config == b.config and all(map(np.array_equal, a.weights, b.weights))


def by_path(model: Model) -> dict[str, np.ndarray]:
    """The arrays under the names of the module's attributes."""
    tree = jax.tree.unflatten(model.tree, model.weights)
    flat, _ = jax.tree.flatten_with_path(tree)
    return {".".join(str(key.key) for key in path if hasattr(key, "key")): np.asarray(leaf) for path, leaf in flat}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_every_array_has_one_source(family: str, tmp_path: Path) -> None:
    config = read_config(build_checkpoint(family, tmp_path))
    for path, parts in stored_parts(config).items():
        for entry in {part.entry for part in parts}:
            filled = [part.rows for part in parts if part.entry == entry]
            if len(filled) == 1:
                assert filled[0] is None, path
            else:
                rows = np.sort(np.concatenate([rows for rows in filled if rows is not None]))
                assert np.array_equal(rows, np.arange(len(rows))), path
        assert [part.entry for part in parts if part.rows is None] in ([None], [], list(range(config.num_experts)))


def test_fused_arrays_are_laid_out_by_kv_head_and_by_block(qwen: Path) -> None:
    ours, theirs = by_path(load_model(qwen)), load_file(qwen / WEIGHTS)
    prefix = "model.layers.1.self_attn"
    q, k, v = (theirs[f"{prefix}.{name}_proj.weight"].T for name in "qkv")  # heads of 16: 4 of q, 2 of k and v
    expected = [q[:, :32], k[:, :16], v[:, :16], q[:, 32:], k[:, 16:], v[:, 16:]]
    assert np.array_equal(ours["layers.1.attention.qkv.weight"], np.concatenate(expected, axis=1))
    gate, up = (theirs[f"model.layers.1.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    columns = [part[:, start : start + 4] for start in range(0, 96, 4) for part in (gate, up)]
    assert np.array_equal(ours["layers.1.mlp.gate_up.weight"], np.concatenate(columns, axis=1))


def test_shards_and_one_file_load_alike(qwen: Path, tmp_path: Path) -> None:
    shards = build_checkpoint("qwen25", tmp_path, tie_word_embeddings=False, max_shard_size="100KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    assert equal(load_model(shards), load_model(qwen))


def test_narrow_weights_widen_exactly(tmp_path: Path) -> None:
    narrow = load_model(build_checkpoint("llama2", tmp_path / "bf16", dtype=torch.bfloat16), dtype="float32")
    wide = load_model(build_checkpoint("llama2", tmp_path / "f32"))
    for ours, exact in zip(narrow.weights, wide.weights, strict=True):
        assert ours.dtype == jnp.float32
        assert np.array_equal(ours, exact.astype(jnp.bfloat16).astype(jnp.float32))


def test_progress_ends_where_it_said(qwen: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_model(qwen, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1] == (calls[0][1], calls[0][1])
    assert calls[-1][1] == sum(tensor.nbytes for tensor in load_file(qwen / WEIGHTS).values())


def test_auto_dtype_is_float32_on_the_cpu(qwen: Path) -> None:
    assert load_model(qwen).dtype == jnp.float32
    assert load_model(qwen).kv_layout(3, 16).shape == (6, 2, 16, 16)


def test_missing_tensor(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert str(error.value) == f"{folder / WEIGHTS}: tensor {Q_PROJ} is missing; expected with shape (64, 64)"


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("qwen3moe", "model.layers.1.mlp.experts.6.up_proj.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight"),
    ],
)
def test_missing_expert(family: str, tensor: str, tmp_path: Path) -> None:
    folder = build_checkpoint(family, tmp_path)
    shape = load_file(folder / WEIGHTS)[tensor].shape
    edit(folder, lambda tensors: tensors.pop(tensor))
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert str(error.value) == f"{folder / WEIGHTS}: tensor {tensor} is missing; expected with shape {shape}"


def test_experts_are_stacked_with_gate_and_up_by_block(tmp_path: Path) -> None:
    folder = build_checkpoint("mixtral", tmp_path)
    ours, theirs = by_path(load_model(folder)), load_file(folder / WEIGHTS)
    for expert in range(4):
        prefix = f"model.layers.1.block_sparse_moe.experts.{expert}"
        gate, up, down = (theirs[f"{prefix}.{name}.weight"].T for name in ("w1", "w3", "w2"))
        columns = [part[:, start : start + 4] for start in range(0, 96, 4) for part in (gate, up)]
        assert np.array_equal(ours["layers.1.mlp.gate_up.weight"][expert], np.concatenate(columns, axis=1))
        assert np.array_equal(ours["layers.1.mlp.down.weight"][expert], down)


def test_misshapen_tensor(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({Q_PROJ: np.zeros((64, 60), np.float32)}))
    with pytest.raises(CheckpointError) as error:
        load_model(folder, progress=lambda done, total: pytest.fail("read before all shapes were checked"))
    message = f"{folder / WEIGHTS}: tensor {Q_PROJ} has shape (64, 60), the config says (64, 64)"
    assert str(error.value) == message


def test_tensor_of_integers(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({Q_PROJ: np.zeros((64, 64), np.int8)}))
    with pytest.raises(
        CheckpointError, match=f"{WEIGHTS}: tensor {Q_PROJ} holds I8; supported are F64, F32, F16, BF16"
    ):
        load_model(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_truncated_file(folder: Path, kept: int) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:kept])
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    size = len(whole[:kept])
    assert str(error.value).startswith(f"{folder / WEIGHTS}: truncated or no safetensors file ({size} bytes)")


def test_spoiled_headers_never_escape_as_other_errors(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    outcomes = set()
    for position in [*range(0, 8), *range(8, 1200, 7)]:
        (folder / WEIGHTS).write_bytes(whole[:position] + bytes([whole[position] ^ 0x15]) + whole[position + 1 :])
        try:
            load_model(folder)
            outcomes.add("loaded")
        except CheckpointError as error:
            assert WEIGHTS in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


def test_folder_without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"neither {WEIGHTS} nor {INDEX}"):
        load_model(folder)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (
            {"weight_map": {Q_PROJ: "model-00002.safetensors"}},
            "model-00002.safetensors: no such file.*places 1 tensors",
        ),
        ({"weight_map": {"absent": "shard.safetensors"}}, "shard.safetensors: tensor absent is missing"),
        ({"weight_map": {Q_PROJ: "../shard.safetensors"}}, "expected a file of the same folder"),
        ({"weight_map": {Q_PROJ: 3}}, "weight_map is .* expected an object of strings"),
        ({"weight_map": {}}, "tensor .* is missing; expected with shape"),
        ({}, "weight_map is missing"),
    ],
)
def test_index_that_does_not_fit_the_folder(folder: Path, index: dict[str, Any], says: str) -> None:
    (folder / WEIGHTS).rename(folder / "shard.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=says):
        load_model(folder)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = build_checkpoint("qwen25", tmp_path, max_shard_size="100KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{shard.name}: truncated"):
        load_model(folder)


def test_unused_tensors_are_told_but_known_buffers_are_not(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    buffers = ("model.layers.0.self_attn.rotary_emb.inv_freq", "transformer.h.0.attn.bias", "h.0.attn.masked_bias")
    edit(folder, lambda tensors: tensors.update(dict.fromkeys(buffers, np.zeros(2, np.float32))))
    with caplog.at_level(logging.WARNING):
        load_model(folder)
    assert caplog.text == ""
    edit(folder, lambda tensors: tensors.update({"model.extra.weight": np.zeros(2, np.float32)}))
    with caplog.at_level(logging.WARNING):
        load_model(folder)
    assert "1 tensors are not used: model.extra.weight" in caplog.text


def test_random_weights_need_the_config_alone(tmp_path: Path) -> None:
    built = build_checkpoint("qwen25", tmp_path / "built", initializer_range=0.05)
    (tmp_path / "bare").mkdir()
    bare = Path(shutil.copy(built / "config.json", tmp_path / "bare")).parent
    model = load_model(bare, load_format="dummy", seed=3)
    assert equal(model, load_model(built, load_format="dummy", seed=3))
    assert not equal(model, load_model(bare, load_format="dummy", seed=4))
    arrays = by_path(model)
    assert np.std(arrays["layers.0.mlp.down.weight"]) == pytest.approx(0.05, rel=0.05)
    assert not np.array_equal(arrays["layers.0.mlp.down.weight"], arrays["layers.1.mlp.down.weight"])
    assert np.all(arrays["norm.scale"] == 1)
    assert np.all(arrays["layers.0.attention.qkv.bias"] == 0)
    native = load_model(bare, load_format="dummy", seed=3, implementation=Implementation.NATIVE)
    assert np.array_equal(by_path(native)["embedding.weight"], pack_weight(jnp.asarray(arrays["embedding.weight"].T)))
    assert np.array_equal(
        by_path(native)["layers.1.mlp.down.weight"], pack_weight(jnp.asarray(arrays["layers.1.mlp.down.weight"]))
    )


@pytest.mark.parametrize(("option", "value"), [("dtype", "int8"), ("load_format", "pickle")])
def test_unknown_options_are_refused(qwen: Path, option: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{option}='{value}'"):
        load_model(qwen, **{option: value})


MEASURE = """
import json, sys, threading
from pathlib import Path
from jaxcept_models.model import load_model

def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))

# The backend, its threads and what it compiles for these shapes are not what is counted.
load_model(sys.argv[2], dtype="float32", implementation=sys.argv[3])
before, peak, stop = anonymous(), 0, threading.Event()

def watch() -> None:
    global peak
    while not stop.wait(0.0005):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(sys.argv[1], dtype="float32", implementation=sys.argv[3])
stop.set()
watcher.join()
sizes = [weight.nbytes for weight in model.weights]
print(json.dumps({"peak": peak - before, "model": sum(sizes)}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("implementation", list(Implementation))
def test_host_memory_holds_the_model_and_a_little_more(tmp_path: Path, implementation: Implementation) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 1024, "max_shard_size": "20MB"}
    large, small = (
        build_checkpoint("llama2", tmp_path / str(layers), dtype=torch.bfloat16, num_hidden_layers=layers, **sizes)
        for layers in (24, 1)
    )
    command = [sys.executable, "-c", MEASURE, large, small, implementation]
    used = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert used["model"] > 200e6
    assert 0.9 * used["model"] < used["peak"] < 1.2 * used["model"], used
