"""The Python API over the shipped model."""

import asyncio
import threading
import time

import pytest
from sizes import SHIPPED

from jaxcept import LLM, AsyncLLM, InterceptOptions, SamplingParams, tool
from jaxcept.engine import EngineDeadError
from jaxcept.scheduler.scheduler import StateError
from jaxcept.tools import builtin

GREEDY = SamplingParams(temperature=0, max_tokens=120)
QUESTION = "What is 37 * 91?"


@pytest.fixture(scope="module")
def llm(slow_costs):
    return LLM(progress=False, **SHIPPED, cost_model=slow_costs)


@pytest.fixture(scope="module")
def async_llm(slow_costs):
    made = AsyncLLM(**SHIPPED, cost_model=slow_costs)
    yield made
    made.close()


def test_generate_calls_the_tool_and_goes_on_with_the_answer(llm):
    output = llm.generate(QUESTION, GREEDY, tools=builtin.TOOLS)[0]
    assert "3367" in output.outputs[0].answer
    (interception,) = output.interceptions
    assert interception.calls[0].name == "calculator" and interception.calls[0].result == "3367"
    assert interception.residency in ("preserved", "swapped", "cached") and interception.num_recomputed < 16
    assert interception.duration_s >= 0 and interception.num_returned > 0


def test_metrics_tell_what_the_engine_did(llm):
    before = llm.get_metrics()
    llm.generate(QUESTION, GREEDY, tools=builtin.TOOLS)
    after = llm.get_metrics()
    assert after["interceptions"] == before["interceptions"] + 1 and after["generated_tokens"] > 0
    assert after["num_running"] == after["num_waiting"] == after["held_blocks"] == after["held_host_blocks"] == 0
    assert after["finished_stop"] == before.get("finished_stop", 0) + 1
    assert 0 <= after["step_prediction_error"] < 10 and after["busy_s"] > before["busy_s"]


def test_conversations_side_by_side_answer_as_they_do_alone(llm):
    questions = [QUESTION, "Hello!", "What is 12 + 30?", "What is the capital of France?"] * 4
    conversations = [[{"role": "user", "content": question}] for question in questions]
    together = llm.chat(conversations, GREEDY, tools=builtin.TOOLS)
    assert [output.request_id for output in together] == [str(i) for i in range(len(questions))]
    for conversation, output in zip(conversations[:4], together[:4], strict=True):
        alone = llm.chat(conversation, GREEDY, tools=builtin.TOOLS)[0]
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids


def test_a_stream_holds_what_the_output_holds(llm):
    deltas = list(llm.chat_stream([{"role": "user", "content": QUESTION}], GREEDY, tools=builtin.TOOLS))
    output = deltas[-1].output
    assert output is not None
    completion = output.outputs[0]
    generated = [d for d in deltas if d.kind in ("generated", "finished")]
    assert "".join(d.text for d in generated) == completion.text
    assert [i for d in generated for i in d.token_ids] == completion.token_ids
    returned = next(d for d in deltas if d.kind == "returned")
    assert returned.token_ids == next(s.token_ids for s in completion.segments if s.kind == "returned")


def test_leaving_a_stream_early_aborts_it(llm):
    stream = llm.generate_stream(["Tell me a story"] * 3, SamplingParams(max_tokens=500, ignore_eos=True))
    next(stream)
    stream.close()
    assert not llm.session.has_work
    llm.session.engine.scheduler.check()
    assert "3367" in llm.generate(QUESTION, GREEDY, tools=builtin.TOOLS)[0].outputs[0].answer


def test_a_call_while_a_stream_is_open_takes_nothing_from_it(llm):
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    alone = [output.outputs[0].token_ids for output in llm.generate(["abc", "def"], params)]
    stream = llm.generate_stream(["abc", "def"], params)
    deltas = [next(stream)]
    assert [output.outputs[0].token_ids for output in llm.generate(["def", "abc"], params)] == alone[::-1]
    left = llm.generate_stream("xyz", params)
    next(left)
    left.close()
    deltas += stream
    ids = {"0": [], "1": []}
    for delta in deltas:
        ids[delta.request_id] += delta.token_ids
    assert list(ids.values()) == alone and not llm.session.has_work


def test_no_step_is_left_in_flight(llm):
    assert llm.generate(QUESTION, GREEDY, tools=builtin.TOOLS)[0].outputs[0].finish_reason == "stop"
    assert llm.session.engine.num_in_flight == 0
    stream = llm.generate_stream("abc", SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()
    assert llm.session.engine.num_in_flight == 0


def test_params_for_each_prompt_and_n(llm):
    params = [SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=5, ignore_eos=True), SamplingParams(max_tokens=3)]
    first, second = llm.generate(["a", "b"], params)
    assert [len(c.token_ids) for c in first.outputs] == [5, 5] and len(second.outputs) == 1
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        llm.generate("a", params)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt_ids is empty"),
        ([1, 10**6], "expected 0 to"),
        ("a " * 3000, "shorten"),
        (["a", 5], "prompts holds 5"),
    ],
)
def test_bad_prompts_are_refused_and_the_next_one_is_served(llm, prompt, message):
    with pytest.raises(ValueError, match=message):
        llm.generate([prompt] if isinstance(prompt, str) else prompt, GREEDY)
    assert not llm.session.has_work
    assert llm.generate("a", SamplingParams(temperature=0, max_tokens=2))[0].outputs[0].finish_reason


def test_two_threads_may_call_one_llm(llm):
    answers = []

    def ask():
        answers.append(llm.generate(QUESTION, GREEDY, tools=builtin.TOOLS)[0].outputs[0].answer)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 3 and all("3367" in answer for answer in answers)


def test_unknown_options_name_what_was_expected():
    with pytest.raises(ValueError, match="intercept_policy='best': expected one of"):
        LLM(intercept_policy="best")
    with pytest.raises(FileNotFoundError, match="no folder"):
        LLM("/does/not/exist")


def collect(async_llm, *args, **options):
    async def run():
        return [delta async for delta in async_llm.generate(*args, **options)]

    return asyncio.run(run())


def test_async_streams_run_side_by_side(async_llm):
    seen = []

    @tool
    def calculator(expression: str) -> str:
        """Work out an arithmetic expression."""
        seen.append(time.monotonic())
        time.sleep(0.2)
        return builtin.calculator(expression)

    async def ask():
        async for delta in async_llm.generate(QUESTION, GREEDY, tools=[calculator]):
            if delta.output is not None:
                return delta.output.outputs[0].answer
        raise AssertionError("the stream ended without an output")

    async def both():
        return await asyncio.gather(ask(), ask())

    answers = asyncio.run(both())
    assert all("3367" in answer for answer in answers)
    assert len(seen) == 2 and abs(seen[0] - seen[1]) < 0.2


def test_somebody_outside_answers_a_call(async_llm):
    schema = builtin_schema("calculator")

    async def run():
        kinds = []
        stream = async_llm.chat([{"role": "user", "content": QUESTION}], GREEDY, tools=[schema], request_id="outside")
        async for delta in stream:
            kinds.append(delta.kind)
            if delta.kind == "intercepted":
                text = "\n<|im_start|>tool\n<tool_response>\n4242\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
                await async_llm.resume("outside", text=text)
                with pytest.raises(StateError):
                    await async_llm.resume("outside", text=text)
            if delta.output is not None:
                return kinds, delta.output
        raise AssertionError("the stream ended without an output")

    kinds, output = asyncio.run(run())
    assert kinds.count("intercepted") == 1 and kinds[-1] == "finished"
    assert "4242" in output.outputs[0].answer


def builtin_schema(name):
    from jaxcept.tools.toolbox import Toolbox

    with Toolbox(builtin.TOOLS) as toolbox:
        return toolbox[name].schema


def test_a_coroutine_that_stops_listening_aborts_its_request(async_llm):
    async def run():
        stream = async_llm.generate("Tell me", SamplingParams(max_tokens=900, ignore_eos=True), request_id="left")
        async for _ in stream:
            break
        await stream.aclose()
        for _ in range(200):
            if not async_llm.session.has_work:
                return True
            await asyncio.sleep(0.02)
        return False

    assert asyncio.run(run())


def test_async_errors_reach_the_caller(async_llm):
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        collect(async_llm, "")
    options = InterceptOptions(strings=("zzz",), timeout_s=5)
    deltas = collect(async_llm, "a", SamplingParams(temperature=0, max_tokens=2), intercept=options)
    assert deltas[-1].kind == "finished"


def test_the_last_step_of_a_request_is_not_charged_with_the_idle_time_behind_it(async_llm):
    deltas = collect(async_llm, QUESTION, GREEDY, tools=builtin.TOOLS)
    assert deltas[-1].finish_reason == "stop", "the step behind the last token was in flight"
    time.sleep(0.3)
    engine = async_llm.session.engine
    assert engine.num_in_flight == 0
    before = engine.metrics()["busy_s"]
    time.sleep(1.0)
    assert engine.metrics()["busy_s"] == before


def test_whoever_waits_is_told_that_the_engine_was_closed(slow_costs):
    made = AsyncLLM(**SHIPPED, cost_model=slow_costs)
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    hold = InterceptOptions(token_ids=tuple(range(made.session.tokenizer.vocab_size)), timeout_s=60)

    async def listen(kinds):
        async for delta in made.generate("a", params, intercept=hold, request_id="held"):
            kinds.append(delta.kind)

    async def run():
        kinds, release, is_stepping = [], threading.Event(), threading.Event()
        stream = asyncio.create_task(listen(kinds))
        while "intercepted" not in kinds:
            await asyncio.sleep(0.02)
        made.session.observers.append(lambda *_: (is_stepping.set(), release.wait(20)))
        await asyncio.to_thread(is_stepping.wait, 20)
        waiting = [
            asyncio.create_task(made.ask(lambda session: 1)),
            asyncio.create_task(made.resume("held", "x")),
            asyncio.create_task(made.submit("b", params, request_id="late")),
        ]
        closing = asyncio.create_task(asyncio.to_thread(made.close))
        while made.is_alive:
            await asyncio.sleep(0.02)
        release.set()
        await closing
        told = await asyncio.wait_for(asyncio.gather(stream, *waiting, return_exceptions=True), 10)
        assert [type(each) for each in told] == [EngineDeadError] * 4
        for call in (made.ask(lambda session: 1), made.resume("held", "x"), made.submit("c", params, request_id="c")):
            with pytest.raises(EngineDeadError, match="closed"):
                await asyncio.wait_for(call, 10)

    asyncio.run(run())
