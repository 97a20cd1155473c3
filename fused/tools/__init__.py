"""The commands of `python -m fused`: doctor, tune."""
