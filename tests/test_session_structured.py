"""Constrained output of a whole engine with the shipped model: every turn is what was asked for."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import pytest

from jaxcept import LLM, InterceptOptions, SamplingParams, tool
from jaxcept.constraint import ToolChoice
from jaxcept.scheduler.params import StructuredOutput
from jaxcept.tools.toolbox import Toolbox
from tests.sizes import SHIPPED
from tests.test_text_grammar import CITY, random_schema

GIVEN = {"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": CITY}}


@pytest.fixture(scope="module")
def llm(slow_costs):
    made = LLM(progress=False, **SHIPPED, cost_model=slow_costs)
    made.compiled_at_start = made.session.engine.runner.compiles.count
    yield made
    assert made.session.engine.runner.compiles.count == made.compiled_at_start, "a request made it compile"
    made.session.engine.scheduler.check()


def generate(llm, structured, temperature, **params):
    """One output for each constraint, all side by side with requests that have none."""
    free = SamplingParams(temperature=temperature, max_tokens=12, seed=1)
    each = [
        SamplingParams(temperature=temperature, max_tokens=300, seed=i, structured=one, **params)
        for i, one in enumerate(structured)
    ]
    outputs = llm.generate([f"Say it: {i}" for i in range(len(each) + 2)], [*each, free, free])
    return [output.outputs[0] for output in outputs[: len(each)]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_are_valid_by_their_schemas(llm, temperature):
    schemas = [random_schema(random.Random(seed)) for seed in range(50)]
    outputs = generate(llm, [StructuredOutput(json_schema=schema) for schema in schemas], temperature)
    assert all(output.finish_reason == "stop" for output in outputs)
    for schema, output in zip(schemas, outputs, strict=True):
        jsonschema.validate(json.loads(output.text), schema)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_regex_choice_grammar(llm, temperature):
    choices = ("red", "green and blue", 'a "quote"')
    outputs = generate(
        llm,
        [
            StructuredOutput(regex=r"[a-c]{2,6}-\d{3}"),
            StructuredOutput(choice=choices),
            StructuredOutput(grammar='start: "(" start? ")"{1,2} | "[" /[0-9]{1,3}/ "]"'),
        ],
        temperature,
    )
    assert re.fullmatch(r"[a-c]{2,6}-\d{3}", outputs[0].text)
    assert outputs[1].text in choices
    assert re.fullmatch(r"\(*(\[\d{1,3}\])?\)+|\[\d{1,3}\]", outputs[2].text)


def test_log_probabilities_are_of_what_may_come(llm):
    structured = StructuredOutput(choice=("yes", "no"))
    (output,) = generate(llm, [structured], 1.0, logprobs=5, top_k=2, top_p=0.9, repetition_penalty=1.2)
    assert output.text in ("yes", "no") and output.logprobs is not None
    assert all(-50 < entry.logprob <= 1e-5 for entry in output.logprobs)


def test_max_tokens_ends_what_is_not_complete(llm):
    params = SamplingParams(temperature=0, max_tokens=3, structured=StructuredOutput(regex="[a-z]{50}"))
    output = llm.generate("x", params)[0].outputs[0]
    assert output.finish_reason == "length" and len(output.token_ids) == 3


def test_a_bad_schema_is_refused_before_anything_is_queued(llm):
    for structured in (StructuredOutput(json_schema={"type": "frob"}), StructuredOutput(regex="((")):
        with pytest.raises(ValueError, match=r"json_schema|regex"):
            llm.generate("x", SamplingParams(structured=structured))
        with pytest.raises(ValueError, match=r"json_schema|regex"):
            llm.session.check(SamplingParams(structured=structured), None, None)
    assert not llm.session.has_work and llm.session.engine.scheduler.num_unfinished == 0
    assert llm.generate("x", SamplingParams(max_tokens=2))[0].outputs[0].token_ids


@tool
def calculator(expression: str) -> str:
    """Computes.

    Args:
        expression: What to compute.
    """
    return "3367"


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_arguments_match_the_schema_under_auto(llm, temperature):
    """A model that is hot enough to write anything calls a tool rightly or not at all."""
    before = llm.get_metrics()
    messages = [[{"role": "user", "content": text}] for text in ("What is 37 * 91?", "Weather in Rio?") * 8]
    params = [SamplingParams(temperature=temperature, max_tokens=100, seed=i) for i in range(len(messages))]
    seen = 0
    with Toolbox([calculator, GIVEN]) as tools:
        outputs = llm.chat(
            messages, params, tools=tools, intercept=InterceptOptions(max_interceptions=2, timeout_s=0.1)
        )
    for output in outputs:
        for interception in output.interceptions:
            for call in interception.calls:
                seen += 1
                assert call.name in ("calculator", "weather"), call
                if call.name == "weather":
                    jsonschema.validate(call.arguments, CITY)
                else:
                    jsonschema.validate(call.arguments, calculator.schema["function"]["parameters"])
    assert seen or temperature
    assert llm.get_metrics()["interceptions"] >= before["interceptions"]


def test_a_named_tool_is_called_once_and_then_the_model_answers(llm):
    choice = ToolChoice(name="calculator", parallel=False)
    with Toolbox([calculator, GIVEN]) as tools:
        (output,) = llm.chat(
            [{"role": "user", "content": "What is 37 * 91?"}],
            SamplingParams(temperature=0, max_tokens=200),
            tools=tools,
            intercept=InterceptOptions(tool_choice=choice),
        )
    (interception,) = output.interceptions
    assert [call.name for call in interception.calls] == ["calculator"] and "3367" in output.outputs[0].answer


def test_with_tool_choice_none_a_call_is_text(llm):
    with Toolbox([calculator]) as tools:
        (output,) = llm.chat(
            [{"role": "user", "content": "What is 37 * 91?"}],
            SamplingParams(temperature=0, max_tokens=60),
            tools=tools,
            intercept=InterceptOptions(tool_choice=ToolChoice("none")),
        )
    assert not output.interceptions
