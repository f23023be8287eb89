"""Tools named on the command line."""

from jaxcept.tools.load import load_tools

__all__ = ["load_tools"]
