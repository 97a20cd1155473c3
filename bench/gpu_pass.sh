#!/usr/bin/env bash
# What only a machine with a GPU can show, in steps that each have a time limit: gpu_pass.py.
cd "$(dirname "$0")/.." || exit 1
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
exec "${PYTHON:-$python}" bench/gpu_pass.py "$@"
