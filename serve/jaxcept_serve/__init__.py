"""The command line; it parses and prints, the engine does the work."""
