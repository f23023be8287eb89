"""Checkpoints: from any mesh to any other, text files with them; nothing loads where a write was cut off."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import build_checkpoint
from costs import HAND
from sizes import SHIPPED

import jaxcept_models.checkpoint as checkpoint_module
from jaxcept import LLM, SamplingParams
from jaxcept.config import shipped_model
from jaxcept.text.folder import read_text_files
from jaxcept_kernels.attention import Implementation
from jaxcept_models.checkpoint import MANIFEST, WEIGHTS, is_checkpoint
from jaxcept_models.errors import CheckpointError
from jaxcept_models.model import Model, load_model
from jaxcept_models.saving import convert_checkpoint, save_checkpoint
from jaxcept_models.sharding import make_mesh
from jaxcept_serve.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


def load(folder: Path, tensor: int = 1, implementation: Implementation = Implementation.XLA) -> Model:
    mesh = make_mesh(tensor) if tensor > 1 else None
    return load_model(folder, dtype="float32", mesh=mesh, implementation=implementation)


def same(a: Model, b: Model) -> bool:
    """Whether two models have the same arrays in the same places."""
    places = all(x.sharding == y.sharding for x, y in zip(a.weights, b.weights, strict=True))
    return places and all(map(np.array_equal, a.weights, b.weights))


@pytest.fixture(scope="module", params=["gptj", "qwen25", "qwen3", "qwen3moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def test_a_checkpoint_of_two_devices_loads_on_one_and_on_four(folder: Path, tmp_path: Path) -> None:
    save_checkpoint(load(folder, tensor=2), tmp_path / "saved", folder)
    for tensor in (1, 2, 4):  # two KV heads: on four devices each is there twice
        assert same(load(tmp_path / "saved", tensor), load(folder, tensor)), tensor


def test_kv_heads_that_were_spread_are_stored_once(tmp_path: Path) -> None:
    folder = build_checkpoint("qwen25", tmp_path / "model")
    save_checkpoint(load(folder, tensor=4), tmp_path / "saved", folder)
    assert same(load(tmp_path / "saved"), load(folder))


def test_a_converted_folder_is_the_same_model_in_its_own_dtype(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert_checkpoint(folder, tmp_path / "out", lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert same(load(tmp_path / "out"), load(folder))
    native = load(tmp_path / "out", implementation=Implementation.NATIVE)
    assert same(native, load(folder, implementation=Implementation.NATIVE))
    save_checkpoint(native, tmp_path / "out", folder)  # packed for the CPU's own kernels
    assert same(load(tmp_path / "out", tensor=2), load(folder, tensor=2))


def test_text_files_travel_along_and_weights_do_not(tmp_path: Path) -> None:
    source, out = shipped_model(), tmp_path / "out"
    convert_checkpoint(source, out)
    assert read_text_files(out).chat_template == read_text_files(source).chat_template
    assert {file.name for file in out.iterdir()} == {
        *(file.name for file in source.iterdir() if file.suffix == ".json"),
        MANIFEST,
        WEIGHTS,
    }


def test_arrays_are_read_in_groups(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_checkpoint(folder, tmp_path / "out")
    monkeypatch.setattr(checkpoint_module, "GROUP_BYTES", 50_000)
    seen: list[int] = []
    model = load_model(tmp_path / "out", dtype="float32", progress=lambda done, total: seen.append(done))
    assert len(seen) > 5 and seen == sorted(set(seen))
    assert same(model, load(folder))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    convert_checkpoint(build_checkpoint("qwen25", tmp_path / "model"), tmp_path / "saved")
    return tmp_path / "saved"


def test_a_folder_that_is_no_checkpoint_is_left_alone(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(ValueError, match="no checkpoint of jaxcept"):
        convert_checkpoint(tmp_path / "model", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_missing_and_truncated_files_are_named(saved: Path) -> None:
    largest = max(
        (file for file in (saved / WEIGHTS).rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )
    content = largest.read_bytes()
    largest.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"{largest.name}: has {len(content) - 1} bytes"):
        load(saved)
    largest.unlink()
    with pytest.raises(CheckpointError, match=f"{largest.name}: no such file"):
        load(saved)


def test_arrays_that_do_not_fit_the_config_are_named(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(CheckpointError, match=r"down.weight has shape \(64, 96\); the config says \(64, 128\)"):
        load(saved)
    (saved / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"layers\.2\.\S+ is missing"):
        load(saved)


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"arrays": {}}, {"files": {}}, {"arrays": {"norm.scale": {"shape": [64], "dtype": "int4"}}}],
)
def test_a_manifest_of_another_kind_is_refused(saved: Path, change: dict[str, object]) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(CheckpointError, match=MANIFEST):
        load(saved)


def test_weights_that_orbax_cannot_read_are_an_error_of_the_checkpoint(saved: Path) -> None:
    """In a process of its own: orbax leaves its other reads alone, and they complain whenever they end."""
    file = saved / WEIGHTS / "state" / "manifest.ocdbt"
    file.write_bytes(b"x" * file.stat().st_size)
    code = "import sys; from jaxcept_models.model import load_model; load_model(sys.argv[1], dtype='float32')"
    command = [sys.executable, "-c", code, str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "CheckpointError" in done.stderr and "Orbax cannot read it" in done.stderr


_KILLED = """
import os, signal, sys
from pathlib import Path
import jax, jax.numpy as jnp
import jaxcept_models.checkpoint as module
folder, source, where = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
if where == "manifest":
    module._write_manifest = die
elif where == "swap":
    rename = Path.rename
    def half(self, target):
        rename(self, target)
        die()
    Path.rename = half
arrays = {f"array{i}": jnp.full((1 << 21,), float(i)) for i in range(8)}
print("saving", flush=True)
while True:
    module.write_checkpoint(folder, arrays, source)
"""


@pytest.mark.parametrize("where", ["weights", "manifest", "swap"])
def test_a_write_that_is_killed_leaves_the_previous_checkpoint_or_nothing_that_loads(saved: Path, where: str) -> None:
    source = saved.with_name("model")
    expected = load(source)
    command = [sys.executable, "-c", _KILLED, str(saved), str(source), where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"saving\n"
        partial = saved.with_name(".saved.partial")
        if where == "weights":
            while not (partial / "config.json").exists():
                assert child.poll() is None
            child.send_signal(signal.SIGKILL)
        assert child.wait(60) == -signal.SIGKILL
    if where == "swap":
        with pytest.raises(CheckpointError):
            load(saved)
        assert same(load(saved.with_name(".saved.replaced")), expected)
    else:
        assert same(load(saved), expected)
        with pytest.raises(CheckpointError):
            load(partial)
    assert not is_checkpoint(partial) or where == "swap"
    convert_checkpoint(source, saved)  # what was left does not stand in the way
    assert same(load(saved), expected)
    assert not partial.exists() and not saved.with_name(".saved.replaced").exists()


def test_an_engine_takes_either_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(shipped_model()), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    prompts, params = ["What is 37 * 91?", "the"], SamplingParams(temperature=0, max_tokens=24)

    HAND.save(tmp_path / "costs.json")

    def tokens(model: Path | None) -> list[list[int]]:
        llm = LLM(model, cost_model=tmp_path / "costs.json", **SHIPPED)
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]

    expected = tokens(None)
    assert all(expected) and tokens(out) == expected


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    absent, empty = capsys.readouterr().err.splitlines()
    assert "no such folder" in absent and "config.json" in empty
