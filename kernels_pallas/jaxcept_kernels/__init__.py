"""Paged KV on the device: layout, attention, KV write, block copy, and the reference of each implementation."""
