"""The openai client, chat completions: the client runs the tools; synchronous, then streamed and asynchronous."""

import asyncio

from common import BASE_URL, DESCRIPTIONS, MODEL, PARAMETERS, QUESTIONS, check, run_tool
from openai import AsyncOpenAI, OpenAI

TOOLS = [
    {"type": "function", "function": {"name": name, "description": DESCRIPTIONS[name], "parameters": parameters}}
    for name, parameters in PARAMETERS.items()
]


def loop() -> None:
    client = OpenAI(base_url=f"{BASE_URL}/v1", api_key="none")
    messages, answers = [], []
    for question, _ in QUESTIONS:
        messages.append({"role": "user", "content": question})
        while True:
            made = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, temperature=0)
            message = made.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            details = made.usage.prompt_tokens_details
            print(f"  {made.usage.prompt_tokens} prompt tokens, {details.cached_tokens} of them not computed again")
            if not message.tool_calls:
                break
            for call in message.tool_calls:
                result = run_tool(call.function.name, call.function.arguments)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        answers.append(message.content)
    check(answers)


async def streamed() -> None:
    client = AsyncOpenAI(base_url=f"{BASE_URL}/v1", api_key="none")
    messages, answers = [], []
    for question, _ in QUESTIONS:
        messages.append({"role": "user", "content": question})
        while True:
            async with client.chat.completions.stream(
                model=MODEL, messages=messages, tools=TOOLS, temperature=0
            ) as stream:
                message = (await stream.get_final_completion()).choices[0].message
            calls = [call.model_dump(include={"id", "type", "function"}) for call in message.tool_calls or ()]
            messages.append({"role": "assistant", "content": message.content, "tool_calls": calls})
            if not calls:
                messages[-1].pop("tool_calls")
                break
            for call in message.tool_calls:
                result = run_tool(call.function.name, call.function.arguments)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        answers.append(message.content)
    check(answers)


loop()
asyncio.run(streamed())
