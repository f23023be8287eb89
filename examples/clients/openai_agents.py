"""The OpenAI Agents SDK, over responses and over chat completions."""

import asyncio

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from common import BASE_URL, MODEL, QUESTIONS, check, run_tool
from openai import AsyncOpenAI

set_tracing_disabled(True)


@function_tool
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    return run_tool("calculator", {"expression": expression})


@function_tool
def lookup(entity: str, attribute: str) -> str:
    """Look up an attribute of an entity."""
    return run_tool("lookup", {"entity": entity, "attribute": attribute})


async def main() -> None:
    client = AsyncOpenAI(base_url=f"{BASE_URL}/v1", api_key="none")
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        agent = Agent(
            name="assistant",
            model=kind(model=MODEL, openai_client=client),
            tools=[calculator, lookup],
            model_settings=ModelSettings(temperature=0),
        )
        given, answers = [], []
        for question, _ in QUESTIONS:
            result = await Runner.run(agent, [*given, {"role": "user", "content": question}])
            answers.append(str(result.final_output))
            given = result.to_input_list()
        check(answers)


asyncio.run(main())
