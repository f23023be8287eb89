"""Architectures as flax.nnx modules, and their weights out of Hugging Face folders."""
