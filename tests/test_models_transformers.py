"""Every family computes what transformers computes: PyTorch on the CPU in float32 with plain attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, SEES, build_checkpoint, reference_model
from paging import PagedRun, run_prompt

from jaxcept_kernels.attention import Implementation
from jaxcept_models.model import Model, load_model

VOCAB = 160
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biased": (
        "llama2",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "head_dim": 24,
            "num_key_value_heads": 1,
        },
    ),
    "llama-odd-sizes": ("llama31", {"vocab_size": 167, "intermediate_size": 87, "num_hidden_layers": 3}),
    "llama-linear": ("llama2", {"rope_parameters": LINEAR}),
    "qwen25-yarn": ("qwen25", {"rope_parameters": YARN, "tie_word_embeddings": False, "num_key_value_heads": 4}),
    "qwen3-biased": ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    "qwen3moe-unnormed": ("qwen3moe", {"norm_topk_prob": False, "num_experts": 5, "moe_intermediate_size": 40}),
    "mistral-windows": ("mistral", {"sliding_window": 24}),
    "qwen25-windows": (
        "qwen25",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1},
    ),
    SEES: (SEES, {}),
    "gemma2-wide-window": ("gemma2", {"sliding_window": 4096, "attention_bias": True, "tie_word_embeddings": True}),
    "gptj-tied": ("gptj", {"tie_word_embeddings": True, "n_inner": 112, "rotary_dim": 16}),
}

NATIVE = (
    *("gptj", "qwen3", "qwen3moe-unnormed", "llama-biased", "llama-odd-sizes"),
    *("gemma2", "gemma3", "mistral-windows"),
)


class Twins(NamedTuple):
    """One checkpoint in both packages."""

    folder: Path
    ours: Model
    reference: Any

    def expected(self, ids: list[int]) -> np.ndarray:
        """transformers' logits: [tokens, vocab]"""
        with torch.no_grad():
            logits: np.ndarray = self.reference(torch.tensor([ids])).logits[0].numpy()
        return logits

    def expected_greedy(self, ids: list[int], count: int) -> list[int]:
        """transformers' greedy continuation, not ended by any token."""
        self.reference.generation_config.eos_token_id = None
        made = self.reference.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
        return [int(token) for token in made[0, len(ids) :]]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Twins]:
    """Builds and loads a family's checkpoint once per module."""
    made: dict[str, Twins] = {}

    def get(name: str) -> Twins:
        if name not in made:
            family, overrides = SHAPES.get(name, (name, {}))
            folder: Path = build_checkpoint(family, tmp_path_factory.mktemp(name), **overrides)
            made[name] = Twins(folder, load_model(folder), reference_model(folder))
        return made[name]

    return get


def prompt(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, VOCAB, length)]


def assert_close(ours: np.ndarray, expected: np.ndarray) -> None:
    assert ours.shape == expected.shape
    assert ours.dtype == np.float32
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", [*FAMILIES, *SHAPES])
def test_prompt_logits(twins: Callable[[str], Twins], name: str) -> None:
    pair, ids = twins(name), prompt(90)
    expected = pair.expected(ids)
    assert_close(run_prompt(pair.ours, ids), expected)


@pytest.mark.parametrize("name", NATIVE)
def test_native_prompt_logits(twins: Callable[[str], Twins], name: str) -> None:
    pair, ids = twins(name), prompt(90)
    native = load_model(pair.folder, implementation=Implementation.NATIVE)
    assert any(weight.ndim > 2 for weight in native.weights)
    assert_close(run_prompt(native, ids), pair.expected(ids))


@pytest.mark.parametrize("family", ["gptj", "qwen3", "qwen3moe", "qwen3moe-unnormed", "gemma2"])
def test_native_bits_do_not_depend_on_the_batch(twins: Callable[[str], Twins], family: str) -> None:
    model = load_model(twins(family).folder, implementation=Implementation.NATIVE)
    ids = prompt(40)
    whole = run_prompt(model, ids)
    for tokens in (1, 7):
        alone = PagedRun(model, tokens=tokens)
        parts = [alone.step({2: ids[start : start + tokens]})[2] for start in range(0, len(ids), tokens)]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_decode_steps_continue_as_transformers_generates(twins: Callable[[str], Twins], family: str) -> None:
    pair, ids = twins(family), prompt(45, seed=1)
    run = PagedRun(pair.ours)
    first, second = run.step({0: ids[:29]})[0], run.step({0: ids[29:]})[0]
    assert_close(np.concatenate([first, second]), pair.expected(ids))
    expected = pair.expected_greedy(ids, 32)
    assert len(set(expected)) > 4, "a reference that repeats itself would show little"
    assert run.greedy(int(second[-1].argmax()), 32) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batch_mixes_decode_prefill_and_late_chunks(twins: Callable[[str], Twins], family: str) -> None:
    pair = twins(family)
    texts = [prompt(length, seed=length) for length in (9, 40, 23, 1)]
    run = PagedRun(pair.ours)
    got: list[list[np.ndarray]] = [[], [], [], []]
    steps = (
        {0: texts[0][:8], 1: texts[1][:20]},
        {0: texts[0][8:], 1: texts[1][20:33], 3: texts[3]},  # a decode, a chunk, a prompt of one token
        {1: texts[1][33:], 2: texts[2]},
    )
    for added in steps:
        for seq, logits in run.step(added).items():
            got[seq].append(logits)
    for text, parts in zip(texts, got, strict=True):
        assert_close(np.concatenate(parts), pair.expected(text))


@pytest.mark.parametrize("family", ["llama31", "qwen3moe"])
def test_bfloat16_stays_close(family: str, tmp_path: Path) -> None:
    folder, ids = build_checkpoint(family, tmp_path), prompt(40)
    with torch.no_grad():
        expected = reference_model(folder)(torch.tensor([ids])).logits[0].numpy()
    model = load_model(folder, dtype="bfloat16")
    assert {str(weight.dtype) for weight in model.weights} == {"bfloat16"}
    assert np.abs(run_prompt(model, ids) - expected).max() < 0.06 * np.abs(expected).max()
