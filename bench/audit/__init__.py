"""What the Triton kernels are made of, on every target, without a GPU (docs/audit.md)."""
