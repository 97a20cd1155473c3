"""Tests that run in Triton's interpreter: a process of its own (see ../test_row_interpreter.py)."""

import os
import sys
from pathlib import Path

# oracle.py; channel_cases.py, tolerances.py
sys.path[:0] = (str(Path(__file__).resolve().parents[i]) for i in (1, 2))

if os.environ.get("TRITON_INTERPRET") == "1":
    from bench.audit import interpreter  # found by ../conftest.py

    interpreter.install()
else:
    collect_ignore_glob = ["test_*.py"]
