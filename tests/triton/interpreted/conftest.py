"""Tests that run in Triton's interpreter: a process of its own (see ../test_row_interpreter.py)."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # interpreter.py, oracle.py

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.install()
else:
    collect_ignore_glob = ["test_*.py"]
