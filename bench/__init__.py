"""Measurements against eager torch, torch.compile and the machine's limits: python -m bench."""
