"""The openai client, responses: each turn names the one before, and sends nothing but what is new."""

from common import BASE_URL, DESCRIPTIONS, MODEL, PARAMETERS, QUESTIONS, check, run_tool
from openai import OpenAI

client = OpenAI(base_url=f"{BASE_URL}/v1", api_key="none")
tools = [
    {"type": "function", "name": name, "description": DESCRIPTIONS[name], "parameters": parameters}
    for name, parameters in PARAMETERS.items()
]
previous, answers = None, []
for question, _ in QUESTIONS:
    given = [{"role": "user", "content": question}]
    while given:
        made = client.responses.create(
            model=MODEL, input=given, tools=tools, previous_response_id=previous, temperature=0
        )
        previous = made.id
        given = [
            {"type": "function_call_output", "call_id": item.call_id, "output": run_tool(item.name, item.arguments)}
            for item in made.output
            if item.type == "function_call"
        ]
    answers.append(made.output_text)
check(answers)
