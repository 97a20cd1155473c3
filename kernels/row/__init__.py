"""Norms along rows, and gated activations."""
