"""Chains in any model: found in the graph that torch.compile captures, and run by the kernels."""
