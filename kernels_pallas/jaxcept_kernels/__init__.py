"""Paged KV on the device: layout, attention, KV write, block copy, and the references that every implementation is held to."""
