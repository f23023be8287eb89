"""LangChain's ChatOpenAI with tools bound to it."""

from common import BASE_URL, MODEL, QUESTIONS, check, run_tool
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    return run_tool("calculator", {"expression": expression})


@tool
def lookup(entity: str, attribute: str) -> str:
    """Look up an attribute of an entity."""
    return run_tool("lookup", {"entity": entity, "attribute": attribute})


tools = {"calculator": calculator, "lookup": lookup}
model = ChatOpenAI(model=MODEL, base_url=f"{BASE_URL}/v1", api_key="none", temperature=0)
bound = model.bind_tools(list(tools.values()))
messages, answers = [], []
for question, _ in QUESTIONS:
    messages.append(HumanMessage(question))
    while True:
        message = bound.invoke(messages)
        messages.append(message)
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            result = tools[call["name"]].invoke(call["args"])
            messages.append(ToolMessage(result, tool_call_id=call["id"]))
    answers.append(str(message.content))
check(answers)
