"""The anthropic client: tool_use and tool_result blocks; whole, then streamed."""

from anthropic import Anthropic
from common import BASE_URL, DESCRIPTIONS, MODEL, PARAMETERS, QUESTIONS, check, run_tool

client = Anthropic(base_url=BASE_URL, api_key="none")
tools = [
    {"name": name, "description": DESCRIPTIONS[name], "input_schema": parameters}
    for name, parameters in PARAMETERS.items()
]


def ask(messages: list, streamed: bool):
    asked = {"model": MODEL, "max_tokens": 200, "messages": messages, "tools": tools, "extra_body": {"temperature": 0}}
    if not streamed:
        return client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        return stream.get_final_message()


for streamed in (False, True):
    messages, answers = [], []
    for question, _ in QUESTIONS:
        messages.append({"role": "user", "content": question})
        while True:
            made = ask(messages, streamed)
            messages.append({"role": "assistant", "content": [block.model_dump() for block in made.content]})
            if made.stop_reason != "tool_use":
                break
            results = [
                {"type": "tool_result", "tool_use_id": block.id, "content": run_tool(block.name, block.input)}
                for block in made.content
                if block.type == "tool_use"
            ]
            messages.append({"role": "user", "content": results})
        answers.append("".join(block.text for block in made.content if block.type == "text"))
    check(answers)
