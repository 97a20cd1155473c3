"""bench/ can be imported: bench.audit compiles kernels and interprets them."""

import sys
from pathlib import Path

# Last, so that the installed package is found before ./fused.
sys.path.append(str(Path(__file__).resolve().parents[2]))
