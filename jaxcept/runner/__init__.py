"""Obeys: turns a plan into one padded batch and one compiled step."""
