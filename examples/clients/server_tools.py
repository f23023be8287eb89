"""The server runs the tools (its own, or an MCP server's): one request a question, however many calls it takes."""

from common import BASE_URL, MODEL, QUESTIONS, check
from openai import OpenAI

client = OpenAI(base_url=f"{BASE_URL}/v1", api_key="none")
messages, answers, calls = [], [], 0
for question, _ in QUESTIONS:
    messages.append({"role": "user", "content": question})
    made = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    message = made.choices[0].message
    for call in message.model_extra.get("jaxcept_tools") or ():
        print(f"  the server ran {call['name']}: {call.get('result')}")
        calls += 1
    messages.append({"role": "assistant", "content": message.content})
    answers.append(message.content)
check(answers, calls)
