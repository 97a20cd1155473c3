"""Norms over samples or positions, and dropout of channels."""
