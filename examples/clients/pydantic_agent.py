"""pydantic-ai's Agent."""

from common import BASE_URL, MODEL, QUESTIONS, check, run_tool
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{BASE_URL}/v1", api_key="none"))
agent = Agent(model, model_settings={"temperature": 0})


@agent.tool_plain
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    return run_tool("calculator", {"expression": expression})


@agent.tool_plain
def lookup(entity: str, attribute: str) -> str:
    """Look up an attribute of an entity."""
    return run_tool("lookup", {"entity": entity, "attribute": attribute})


history, answers = [], []
for question, _ in QUESTIONS:
    result = agent.run_sync(question, message_history=history)
    history = result.all_messages()
    answers.append(result.output)
check(answers)
