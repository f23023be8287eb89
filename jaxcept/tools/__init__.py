"""Tools: definitions from signatures, call parsers, executors and their limits."""
