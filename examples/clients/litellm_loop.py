"""LiteLLM, as an OpenAI-compatible provider."""

import litellm
from common import BASE_URL, DESCRIPTIONS, MODEL, PARAMETERS, QUESTIONS, check, run_tool

tools = [
    {"type": "function", "function": {"name": name, "description": DESCRIPTIONS[name], "parameters": parameters}}
    for name, parameters in PARAMETERS.items()
]
messages, answers = [], []
for question, _ in QUESTIONS:
    messages.append({"role": "user", "content": question})
    while True:
        made = litellm.completion(
            model=f"openai/{MODEL}",
            api_base=f"{BASE_URL}/v1",
            api_key="none",
            messages=messages,
            tools=tools,
            temperature=0,
        )
        message = made.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            result = run_tool(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    answers.append(message.content)
check(answers)
