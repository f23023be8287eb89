"""Decides: sequences, blocks, prefix cache, policies and queues. Standard library only."""
