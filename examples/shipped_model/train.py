"""Train the shipped model from generated conversations: `python -m examples.shipped_model.train`.

A stopped run goes on where its last checkpoint was when the same command is given again. The best weights so far,
by exact success on a validation set, always lie in the output folder.
"""

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from examples.shipped_model import data
from examples.shipped_model.network import Shape, Weights, forward, initial_weights, lay_induction, save_model
from examples.shipped_model.tokenizer import END_OF_TEXT, TURN_END, TURN_START, render, save_tokenizer, train_tokenizer

WIDTH_STEP = 64
MAX_WIDTH = 576
NUM_COPYING_STEPS = 50
COPYING_EVERY = 8
BUFFER_SIZE = 2048
VALIDATION_SEED = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """Conversations of like length; the loss counts where `is_target` says that the model wrote the next token."""

    token_ids: np.ndarray  # int32 [rows, width]
    is_target: np.ndarray  # bool [rows, width]
    kinds: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        return self.token_ids.size


class Encoder:
    """Conversations into rows of token ids, with what the assistant wrote marked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._head = np.array(tokenizer.encode(f"{TURN_START}assistant\n").ids)
        self._end = token_id(tokenizer, TURN_END)
        self._pad = token_id(tokenizer, END_OF_TEXT)
        self.digit_ids = [token_id(tokenizer, digit) for digit in "0123456789"]

    def rows(self, conversations: list[data.Conversation]) -> list[tuple[np.ndarray, np.ndarray, str]]:
        texts = [render(conversation.messages, conversation.tools) for conversation in conversations]
        encoded = [np.array(e.ids, np.int32) for e in self._tokenizer.encode_batch(texts)]
        return [(ids, self._written(ids), c.kind) for ids, c in zip(encoded, conversations, strict=True)]

    def batches(self, conversations: list[data.Conversation], batch_tokens: int) -> list[Batch]:
        """Rows sorted by length into full batches; what does not fill a batch, or is too long, is left out."""
        buckets: dict[int, list[tuple[np.ndarray, np.ndarray, str]]] = {}
        batches = []
        for row in self.rows(conversations):
            width = -(-len(row[0]) // WIDTH_STEP) * WIDTH_STEP
            if width > MAX_WIDTH:
                continue
            bucket = buckets.setdefault(width, [])
            bucket.append(row)
            if len(bucket) == max(1, batch_tokens // width):
                batches.append(self._pad_batch(bucket, width))
                bucket.clear()
        return batches

    def _pad_batch(self, rows: list[tuple[np.ndarray, np.ndarray, str]], width: int) -> Batch:
        token_ids = np.full((len(rows), width), self._pad, np.int32)
        is_target = np.zeros((len(rows), width), bool)
        for i, (ids, written, _) in enumerate(rows):
            token_ids[i, : len(ids)] = ids
            is_target[i, : len(ids) - 1] = written[1:]
        return Batch(token_ids, is_target, tuple(kind for _, _, kind in rows))

    def _written(self, ids: np.ndarray) -> np.ndarray:
        """True for each token of an assistant turn, its end marker included."""
        written = np.zeros(len(ids), bool)
        size = len(self._head)
        for start in np.flatnonzero(ids == self._head[0]):
            if np.array_equal(ids[start : start + size], self._head):
                end = start + int(np.argmax(ids[start:] == self._end))
                written[start + size : end + 1] = True
        return written


def token_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of a text that is one token; ValueError if it is not."""
    (only,) = tokenizer.encode(text).ids
    return int(only)


def copying_batch(seed: int, vocab_size: int, digit_ids: list[int], batch_tokens: int) -> Batch:
    """Random tokens, in half of the rows digits alone, each row twice over: a warm-up in copying."""
    rng = np.random.default_rng(seed)
    token_ids = np.zeros((batch_tokens // WIDTH_STEP, WIDTH_STEP), np.int32)
    is_target = np.zeros(token_ids.shape, bool)
    for i in range(len(token_ids)):
        length = rng.integers(6, WIDTH_STEP // 2)
        drawn = rng.choice(digit_ids, length) if i % 2 else rng.integers(0, vocab_size, length)
        token_ids[i] = np.resize(drawn, WIDTH_STEP)
        is_target[i, length : 2 * length - 1] = True
    return Batch(token_ids, is_target, ("copying",) * len(token_ids))


def training_batches(encoder: Encoder, seed: int, batch_tokens: int, first_buffer: int) -> Iterator[tuple[int, Batch]]:
    """Batches with the number of the buffer they come from; a buffer is shuffled, and is the unit of resumption."""
    for number in itertools.count(first_buffer):
        conversations = list(itertools.islice(data.training(seed * 1_000_003 + number + 1), BUFFER_SIZE))
        batches = encoder.batches(conversations, batch_tokens)
        random.Random(number).shuffle(batches)
        for batch in batches:
            yield number, batch


@partial(jax.jit, static_argnums=(3, 4), donate_argnums=(0, 1))
def train_step(
    weights: Weights,
    state: optax.OptState,
    arrays: tuple[jax.Array, jax.Array],
    shape: Shape,
    optimizer: optax.GradientTransformation,
) -> tuple[Weights, optax.OptState, jax.Array]:
    token_ids, is_target = arrays

    def mean_loss(weights: Weights) -> jax.Array:
        logits = forward(weights, token_ids, shape)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, token_ids[:, 1:])
        mask = is_target[:, :-1]
        return jnp.where(mask, losses, 0.0).sum() / mask.sum()

    loss, gradients = jax.value_and_grad(mean_loss)(weights)
    updates, state = optimizer.update(gradients, state, weights)
    return optax.apply_updates(weights, updates), state, loss


@partial(jax.jit, static_argnums=2)
def is_exact(weights: Weights, arrays: tuple[jax.Array, jax.Array], shape: Shape) -> jax.Array:
    """Per row, whether greedy decoding would write every assistant token as it should be: bool [rows]."""
    token_ids, is_target = arrays
    predicted = jnp.argmax(forward(weights, token_ids, shape)[:, :-1], axis=-1)
    return jnp.all((predicted == token_ids[:, 1:]) | ~is_target[:, :-1], axis=1)


def success(weights: Weights, batches: list[Batch], shape: Shape) -> tuple[float, dict[str, float]]:
    """Share of conversations written without a wrong token: of all, and by kind."""
    by_kind: dict[str, list[bool]] = {}
    for batch in batches:
        exact = np.asarray(is_exact(weights, (batch.token_ids, batch.is_target), shape))
        for kind, good in zip(batch.kinds, exact, strict=True):
            by_kind.setdefault(kind, []).append(bool(good))
    everything = [good for goods in by_kind.values() for good in goods]
    return float(np.mean(everything)), {kind: float(np.mean(goods)) for kind, goods in sorted(by_kind.items())}


def make_optimizer(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(100, num_steps // 10), num_steps, learning_rate / 50
    )
    decayed = lambda weights: {name: weight.ndim == 2 for name, weight in weights.items()}  # noqa: E731
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05, mask=decayed))


def save_checkpoint(file: Path, weights: Weights, state: optax.OptState, position: dict[str, Any]) -> None:
    arrays: dict[str, Any] = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves((weights, state)))}
    partial_file = file.with_suffix(".partial.npz")
    np.savez(partial_file, position=json.dumps(position), **arrays)
    partial_file.replace(file)


def load_checkpoint(
    file: Path, weights: Weights, state: optax.OptState
) -> tuple[Weights, optax.OptState, dict[str, Any]]:
    with np.load(file) as arrays:
        leaves, tree = jax.tree.flatten((weights, state))
        loaded = [jnp.asarray(arrays[str(i)]) for i in range(len(leaves))]
        weights, state = jax.tree.unflatten(tree, loaded)
        return weights, state, json.loads(str(arrays["position"]))


class Training:
    """One run: weights, optimizer state and position, as the checkpoint holds them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._shape = Shape()
        self._tokenizer = self._first_tokenizer()
        self._encoder = Encoder(self._tokenizer)
        held_out = data.held_out(VALIDATION_SEED, options.num_validation)
        self._validation = self._encoder.batches(held_out, options.batch_tokens)
        self._optimizer = make_optimizer(options.learning_rate, options.num_steps)
        self._weights = self._first_weights()
        self._state = self._optimizer.init(self._weights)
        self._position: dict[str, Any] = {"step": 0, "buffer": 0, "tokens": 0, "seconds": 0.0, "best": -1.0}
        self._checkpoint = options.work / "checkpoint.npz"
        options.work.mkdir(parents=True, exist_ok=True)
        if self._checkpoint.exists():
            loaded = load_checkpoint(self._checkpoint, self._weights, self._state)
            self._weights, self._state, self._position = loaded

    def _first_tokenizer(self) -> Tokenizer:
        start = self._options.start
        if start is None:
            return train_tokenizer(self._options.seed, self._shape.vocab_size)
        return Tokenizer.from_file(str(start / "tokenizer.json"))

    def _first_weights(self) -> Weights:
        start, seed = self._options.start, self._options.seed
        if start is None:
            return lay_induction(initial_weights(self._shape, seed), self._shape, seed)
        return {name: jnp.asarray(array) for name, array in load_file(start / "model.safetensors").items()}

    def run(self, progress: Progress) -> None:
        """Train up to `num_steps`, with a check of the success and a checkpoint every `check_every` steps."""
        options, position = self._options, self._position
        started, losses = time.monotonic() - position["seconds"], []
        bar = progress.add_task("training", total=options.num_steps, completed=position["step"])
        for buffer, batch in self._batches():
            if position["step"] >= options.num_steps:
                break
            losses.append(self._step(batch))
            position |= {
                "step": position["step"] + 1,
                "buffer": buffer,
                "tokens": position["tokens"] + batch.num_tokens,
            }
            position["seconds"] = time.monotonic() - started
            progress.update(bar, completed=position["step"], description=f"loss {losses[-1]:.3f}")
            if position["step"] % options.check_every == 0 or position["step"] == options.num_steps:
                progress.console.print(self._check(float(np.mean(losses))), soft_wrap=True)
                losses.clear()

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        """Conversations; in the first steps, and in every eighth, a batch for copying stands in for one."""
        options, position, encoder = self._options, self._position, self._encoder
        for buffer, batch in training_batches(encoder, options.seed, options.batch_tokens, position["buffer"]):
            step = position["step"]
            if step % COPYING_EVERY == 0 or (step < NUM_COPYING_STEPS and options.start is None):
                yield buffer, copying_batch(step, self._shape.vocab_size, encoder.digit_ids, options.batch_tokens)
            else:
                yield buffer, batch

    def _step(self, batch: Batch) -> float:
        arrays = (jnp.asarray(batch.token_ids), jnp.asarray(batch.is_target))
        stepped = train_step(self._weights, self._state, arrays, self._shape, self._optimizer)
        self._weights, self._state, loss = stepped
        return float(loss)

    def _check(self, loss: float) -> str:
        """Keep the weights if they are the best so far, write the checkpoint, and report."""
        position, out = self._position, self._options.out
        share, by_kind = success(self._weights, self._validation, self._shape)
        if share > position["best"]:
            position["best"] = share
            end, pad = (token_id(self._tokenizer, text) for text in (TURN_END, END_OF_TEXT))
            save_model(self._weights, self._shape, end, pad, out)
            save_tokenizer(self._tokenizer, out)
        save_checkpoint(self._checkpoint, self._weights, self._state, position)
        kinds = " ".join(f"{kind} {share:.2f}" for kind, share in by_kind.items())
        minutes, millions = position["seconds"] / 60, position["tokens"] / 1e6
        head = f"step {position['step']}, {millions:.2f} M tokens, {minutes:.1f} min, loss {loss:.4f}"
        return f"{head}, exact {share:.3f} ({kinds})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("models/jaxcept_models/shipped"), help="folder of the best model"
    )
    parser.add_argument("--work", type=Path, default=Path(".cache/shipped_model"), help="folder of the checkpoint")
    parser.add_argument(
        "--start", type=Path, help="folder of a model to go on from (default: a model without training)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--check-every", type=int, default=100)
    parser.add_argument("--num-validation", type=int, default=400)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        Training(parser.parse_args()).run(progress)


if __name__ == "__main__":
    main()
