"""Norms, gates and dropout that torch has not, and jagged tensors."""
