"""The whole engine on the device against transformers: tokens, policies, compilations."""

import functools
import itertools
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, build_checkpoint
from costs import HAND
from transformers import AutoModelForCausalLM

from jaxcept.clock import MonotonicClock
from jaxcept.engine import Engine
from jaxcept.metrics import Ledger
from jaxcept.runner.runner import DeviceRunner, RunnerConfig
from jaxcept.scheduler.config import SchedulerConfig
from jaxcept.scheduler.events import Finished, Intercepted, PromptLogprobs, Tokens
from jaxcept.scheduler.params import InterceptParams, SamplingParams, ScriptedTrigger
from jaxcept.scheduler.policies.discard import Discard
from jaxcept.scheduler.policies.preserve import Preserve
from jaxcept.scheduler.request import Request
from jaxcept.scheduler.scheduler import Scheduler
from jaxcept.scheduler.speculation import Speculation, SpeculationConfig
from jaxcept_kernels.attention import Implementation
from jaxcept_kernels.library import native_available
from jaxcept_models.model import load_model

# XLA's programs take a minute to compile for each family. Where the CPU's own kernels are built they serve, and XLA is
# tried with one of them; every family's logits and chunks are compared in test_models_transformers.py, by XLA.
SERVED = [family for family in FAMILIES if family != "gemma3"]  # which an engine serves as gemma2
CASES = [(family, Implementation.NATIVE) for family in SERVED if native_available()] + [
    (family, Implementation.XLA) for family in SERVED if not native_available() or family == "llama31"
]
NUM_BLOCKS = 256
SIZES = (8, 8, 24, 512)  # block size, sequences, tokens of a step, of a sequence
NUM_NEW = 128
VOCABULARY = 96


@functools.lru_cache(maxsize=2)
def make_runner(model, *sizes):
    """Compiled once for all engines of these sizes; what one engine left in the pool is nobody's.

    Few are kept: the programs of one are 4,000 memory mappings of a process that may have 65,530.
    """
    runner = DeviceRunner(model, RunnerConfig(*sizes))
    runner.warm_up()
    return runner


@pytest.fixture(scope="module", autouse=True)
def runners():
    yield
    make_runner.cache_clear()


def make_engine(model, *, num_blocks=NUM_BLOCKS, policy=None, depth=1, drafts=None, **config):
    """An engine of the runner that all share; its scheduler may know of fewer blocks."""
    runner = make_runner(model, NUM_BLOCKS, *SIZES)
    scheduler = Scheduler(
        SchedulerConfig(num_blocks, *SIZES, model.config.vocab_size, **config), policy or Preserve(), speculation=drafts
    )
    return Engine(scheduler, runner, MonotonicClock(), Ledger(runner.layout.block_bytes), depth)


def run(engine, returns=()):
    """Steps to the end; an intercepted sequence is resumed with the next of `returns` some steps later."""
    finished, prompt_logprobs, logprobs, due = {}, {}, {}, []
    answers = {}
    for count in itertools.count():
        assert count < 20_000, "the engine does not come to an end"
        for event in engine.step():
            if isinstance(event, Finished):
                finished[event.request_id] = event
            elif isinstance(event, PromptLogprobs):
                prompt_logprobs[event.request_id] = event.entries
            elif isinstance(event, Tokens):
                for seq_id, entry in event.logprobs.items():
                    logprobs.setdefault(seq_id, []).append(entry)
            elif isinstance(event, Intercepted):
                answer = answers.setdefault(event.request_id, iter(returns))
                due.append((count + 5, event.seq_id, next(answer)))
        engine.scheduler.check()
        while due and due[0][0] <= count:
            _, seq_id, ids = due.pop(0)
            engine.resume(seq_id, ids)
        if not due and not engine.scheduler.num_unfinished and not engine.has_work:
            return finished, prompt_logprobs, logprobs
    raise AssertionError


def new_ids(event):
    return list(event.token_ids[event.num_prompt :])


@pytest.fixture(scope="module")
def prompts():
    """A mixed batch; some share a prefix, so that the cache has hits."""
    rng = np.random.default_rng(7)
    lengths = [3, 9, 17, 40, 90, 150, 5, 33, 64, 8, 100, 21, 2, 70, 55, 12]
    made = [rng.integers(0, VOCABULARY, size=n).tolist() for n in lengths]
    made[9:12] = [made[5][:48] + prompt for prompt in made[9:12]]
    return made


def reference_tokens(folder, prompts):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None  # otherwise generate suppresses it, or ends with it
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            new = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_NEW, pad_token_id=0
            )
        out.append(new[0, len(prompt) :].tolist())
    return out


def greedy(**changes):
    return SamplingParams(**{"temperature": 0, "max_tokens": NUM_NEW, "ignore_eos": True} | changes)


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_greedy_tokens_equal_transformers_alone_and_in_a_mixed_batch(tmp_path, prompts, family, implementation):
    checkpoint = build_checkpoint(family, tmp_path)
    expected = reference_tokens(checkpoint, prompts)
    model = load_model(checkpoint, dtype="float32", implementation=implementation)
    assert model.config.vocab_size >= VOCABULARY
    engine = make_engine(model)
    alone = []
    for index in (0, 5):
        engine.add(Request(f"alone-{index}", tuple(prompts[index]), greedy()))
        finished, _, _ = run(engine)
        alone.append(new_ids(finished[f"alone-{index}"]))
    assert alone == [expected[0], expected[5]]

    compiled = engine.runner.compiles.count
    for index, prompt in enumerate(prompts):
        engine.add(Request(str(index), tuple(prompt), greedy()))
    finished, _, _ = run(engine)
    assert [new_ids(finished[str(i)]) for i in range(len(prompts))] == expected
    assert engine.scheduler.counters.cache_hit_tokens > 0
    assert engine.runner.compiles.count == compiled


@pytest.mark.parametrize("temperature", [0, 0.3])
def test_tokens_with_drafts_are_those_without(small_model, prompts, temperature):
    """Random weights at a low temperature go in circles, which is easily guessed."""
    seen = []
    for drafts in (None, Speculation(SpeculationConfig(shortest=1), HAND)):
        engine = make_engine(small_model, drafts=drafts)
        for index, prompt in enumerate(prompts[:5]):
            engine.add(Request(str(index), tuple(prompt), greedy(temperature=temperature, seed=3)))
        finished, _, _ = run(engine)
        seen.append([new_ids(finished[str(i)]) for i in range(5)])
    assert seen[0] == seen[1]
    assert engine.scheduler.counters.accepted_draft_tokens > 0


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    return load_model(build_checkpoint("llama31", tmp_path_factory.mktemp("small")), dtype="float32")


RETURNS = ([11, 12, 13], [21], [31, 32, 33, 34, 35, 36, 37, 38, 39, 40])


def intercepted_tokens(model, policy, prompts, **config):
    """All ids of each sequence: three interceptions, eight tokens before each and twelve after the last."""
    engine = make_engine(model, policy=policy, **config)
    script = tuple(ScriptedTrigger(8) for _ in RETURNS)
    for index, prompt in enumerate(prompts):
        request = Request(str(index), tuple(prompt), greedy(max_tokens=36), InterceptParams(script=script))
        engine.add(request)
    finished, _, _ = run(engine, RETURNS)
    return [finished[str(i)] for i in range(len(prompts))]


@pytest.fixture(scope="module")
def eight_bit_model(small_model):
    return replace(small_model, kv_cache_dtype=np.dtype(np.int8))


@pytest.mark.parametrize(
    ("caching", "depth", "kv"),
    [(True, 0, "auto"), (True, 1, "auto"), (False, 0, "auto"), (False, 1, "auto"), (True, 1, "int8")],
)
def test_greedy_tokens_are_equal_preserved_discarded_and_never_intercepted(
    small_model, eight_bit_model, caching, depth, kv
):
    small_model = small_model if kv == "auto" else eight_bit_model
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 100, size=n).tolist() for n in (5, 30, 61, 16)]
    config = {"enable_prefix_caching": caching, "depth": depth}
    preserved = intercepted_tokens(small_model, Preserve(), prompts, **config)
    discarded = intercepted_tokens(small_model, Discard(), prompts, **config)
    assert [e.token_ids for e in preserved] == [e.token_ids for e in discarded]
    assert all(i.residency == "preserved" and i.num_recomputed == 0 for e in preserved for i in e.interceptions)
    assert all(i.residency in ("discarded", "cached") for e in discarded for i in e.interceptions)
    recomputed = sum(i.num_recomputed for e in discarded for i in e.interceptions)
    cached = sum(i.num_cached_on_return for e in discarded for i in e.interceptions)
    assert recomputed > 0 and (cached > 0) == caching

    # The same ids given in one prompt: each run of generated tokens follows from what stands before it.
    engine = make_engine(small_model, **config)
    expected = {}
    for event in preserved:
        for start, stop in event.output_spans:
            request = Request(f"{event.seq_id}:{start}", event.token_ids[:start], greedy(max_tokens=stop - start))
            engine.add(request)
            expected[request.request_id] = list(event.token_ids[start:stop])
    finished, _, _ = run(engine)
    assert {request_id: new_ids(event) for request_id, event in finished.items()} == expected


def test_tokens_survive_preemption_in_a_tiny_pool(small_model):
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 100, size=n).tolist() for n in (20, 33, 47, 28)]
    roomy = intercepted_tokens(small_model, Preserve(), prompts)
    tight = intercepted_tokens(small_model, Preserve(), prompts, num_blocks=24)
    assert [e.token_ids for e in tight] == [e.token_ids for e in roomy]
    assert sum(e.num_preemptions for e in tight) + sum(
        i.residency != "preserved" for e in tight for i in e.interceptions
    ) > 0  # fmt: skip


def test_n_completions_share_the_prompt_and_draw_apart(small_model):
    engine = make_engine(small_model)
    prompt = tuple(range(1, 31))
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    engine.add(Request("three", prompt, params))
    together = {}
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Finished):
                together[event.index] = new_ids(event)
        engine.scheduler.check()
    assert engine.scheduler.counters.prefill_tokens < 2 * len(prompt)
    assert len({tuple(ids) for ids in together.values()}) == 3

    engine.add(Request("company", tuple(range(40, 60)), greedy(max_tokens=20)))
    engine.add(Request("again", prompt, SamplingParams(temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)))
    finished, _, _ = run(engine)
    assert new_ids(finished["again"]) == together[0]  # the first completion, whoever shares the batch


def test_logprobs_and_prompt_logprobs_match_transformers(small_model, tmp_path):
    folder = build_checkpoint("llama31", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = np.random.default_rng(9).integers(0, 100, size=75).tolist()
    engine = make_engine(small_model)
    (seq_id,) = engine.add(Request("r", tuple(prompt), greedy(max_tokens=6, logprobs=3, prompt_logprobs=2)))
    finished, prompt_logprobs, logprobs = run(engine)
    ids = list(finished["r"].token_ids)
    with torch.inference_mode():
        table = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()
    entries = [*prompt_logprobs["r"], *logprobs[seq_id]]
    assert len(entries) == len(ids) - 1
    for position, entry in enumerate(entries):
        row, token_id = table[position], ids[position + 1]
        np.testing.assert_allclose(entry.logprob, row[token_id], rtol=1e-4, atol=1e-4)
        assert entry.rank == 1 + int((row > row[token_id] + 1e-6).sum())
        count = 2 if position < len(prompt) - 1 else 3
        np.testing.assert_allclose([v for _, v in entry.top], np.sort(row)[::-1][:count], rtol=1e-4, atol=1e-4)


def test_stop_ids_min_tokens_and_bias(small_model):
    engine = make_engine(small_model)
    engine.add(Request("free", (1, 2, 3), greedy(max_tokens=10)))
    free = new_ids(run(engine)[0]["free"])
    stop = free[3]
    first = free.index(stop)
    engine.add(Request("stop", (1, 2, 3), greedy(max_tokens=10, stop_token_ids=[stop])))
    engine.add(Request("later", (1, 2, 3), greedy(max_tokens=10, stop_token_ids=[stop], min_tokens=7)))
    engine.add(Request("biased", (1, 2, 3), greedy(max_tokens=10, logit_bias={42: 100.0})))
    finished, _, _ = run(engine)
    assert new_ids(finished["stop"]) == free[: first + 1]
    assert finished["stop"].stop_reason == stop
    assert stop not in new_ids(finished["later"])[:7] and len(new_ids(finished["later"])) >= 7
    assert new_ids(finished["biased"]) == [42] * 10


def mixed_request(index, rng):
    """One of many kinds of request."""
    kind = index % 8
    params = {"max_tokens": int(rng.integers(1, 24)), "ignore_eos": bool(rng.integers(2))}
    params |= [
        {"temperature": 0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": index},
        {"temperature": 1.0, "min_p": 0.1, "n": 3},
        {"temperature": 0, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"temperature": 0.5, "logprobs": 5},
        {"temperature": 0, "prompt_logprobs": 1},
        {"temperature": 0, "logit_bias": {3: -5.0}, "stop_token_ids": [9]},
        {"temperature": 0, "min_tokens": 1, "stop_token_ids": [7, 8]},
    ][kind]
    script = tuple(ScriptedTrigger(int(rng.integers(1, 9))) for _ in range(int(rng.integers(0, 3))))
    prompt = tuple(rng.integers(0, 100, size=int(rng.integers(1, 180))).tolist())
    intercept = InterceptParams(script=script if params.get("n", 1) == 1 else ())
    return Request(f"mixed-{index}", prompt, SamplingParams(**params), intercept)


@pytest.mark.parametrize("policy", [Preserve, Discard])
def test_nothing_compiles_over_200_mixed_requests(small_model, policy):
    engine = make_engine(small_model, policy=policy(), num_blocks=128)
    rng = np.random.default_rng(11)
    compiled = engine.runner.compiles.count
    assert compiled > 0
    requests = deque(mixed_request(i, rng) for i in range(200))
    finished, due, count = 0, deque(), 0
    while requests or due or engine.scheduler.num_unfinished or engine.has_work:
        count += 1
        assert count < 20_000, "the engine does not come to an end"
        if requests and count % 2:
            engine.add(requests.popleft())
        for event in engine.step():
            if isinstance(event, Intercepted):
                due.append((count + 3, event.seq_id))
            finished += isinstance(event, Finished)
        while due and due[0][0] <= count:
            engine.resume(due.popleft()[1], (5, 6, 7))
        if count % 16 == 0:
            engine.scheduler.check()
    assert finished == 200 + 2 * 25
    assert engine.scheduler.counters.interceptions > 100
    assert engine.runner.compiles.count == compiled
