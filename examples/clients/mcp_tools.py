"""An MCP server with two tools, over standard input and output: `jaxcept serve --mcp "tools=python mcp_tools.py"`."""

from common import run_tool
from mcp.server.mcpserver import MCPServer

server = MCPServer("tools", log_level="ERROR")


@server.tool()
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    return run_tool("calculator", {"expression": expression})


@server.tool()
def lookup(entity: str, attribute: str) -> str:
    """Look up an attribute of an entity."""
    return run_tool("lookup", {"entity": entity, "attribute": attribute})


server.run()
