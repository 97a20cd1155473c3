#!/usr/bin/env bash
# One piece of everything that only a GPU can show; each is stopped before ten minutes are over.
#
#     bench/gpu_pass.sh PIECE [--out DIR]        DIR: default .cache/gpu
#
#     check    install, doctor, the tests marked gpu, compute-sanitizer on a small set of them
#     rows     norm → activation (→ dropout) along rows: bandwidth beside a copy
#     blocks   training steps of Linear blocks and networks, beside eager and torch.compile
#     images   norms over samples or positions, contiguous and channels-last
#     peers    the norm alone beside Liger, QuACK and flash-attn, as far as they can be imported
#     tune     the first call's latency; python -m fused tune: tiles against their neighbours,
#              Linears as one kernel or two
#
# Works offline: wheels of peers that are unpacked in .cache/peers are found. CSV files, the tests'
# reports and logs go to DIR; `python -m bench report --out DIR` makes tables and pictures of them.
# On a machine without a GPU a piece says so and ends with status 0.
set -euo pipefail
cd "$(dirname "$0")/.."

piece=${1:-}
out=.cache/gpu
[ "${2:-}" = --out ] && out=${3:?--out needs a folder}
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && python=${PYTHON:-.venv/bin/python}
case "$piece" in
  check | rows | blocks | images | peers | tune) ;;
  *)
    sed -n '2,16s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
mkdir -p "$out"
export PYTHONPATH="$PWD/.cache/peers${PYTHONPATH:+:$PYTHONPATH}"

if ! "$python" -c 'import fused' 2>/dev/null; then
  echo "gpu_pass: installing"
  "$python" -m pip install --quiet --no-build-isolation --no-deps -e .
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_pass $piece: torch sees no CUDA device here, so there is nothing to measure or test."
  exit 0
fi
"$python" - <<'PY' | tee "$out/machine.txt"
import shutil, subprocess, torch
print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
query = "name,driver_version,clocks.max.sm,clocks.max.mem,clocks.sm,power.limit,temperature.gpu"
if shutil.which("nvidia-smi"):
    subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], check=False)
PY

# The tests marked gpu in several processes: most of their time is compilation, on the host. Without
# the checkout on sys.path, where the folder kernels/ could be taken for the package of that name.
test_on_gpu() {
  local shards failed=0 pids=() i
  shards=$(nproc)
  [ "$shards" -gt 8 ] && shards=8
  for ((i = 0; i < shards; i++)); do
    PYTHONSAFEPATH=1 FUSED_TEST_SHARD=$i/$shards timeout 330 "$python" -m pytest -q -m gpu tests \
      -p no:cacheprovider --junitxml "$out/gpu-tests-$i.xml" >"$out/gpu-tests-$i.log" 2>&1 &
    pids+=($!)
  done
  for ((i = 0; i < shards; i++)); do
    wait "${pids[$i]}" || {
      failed=1
      grep -E "^(FAILED|ERROR)" "$out/gpu-tests-$i.log" | head -n 40
    }
    tail -n 1 "$out/gpu-tests-$i.log"
  done
  return $failed
}

# One test of each kind of kernel under a tool of compute-sanitizer; it slows kernels a hundredfold.
sanitize() {
  local tool=$1
  if ! command -v compute-sanitizer >/dev/null; then
    echo "gpu_pass check: compute-sanitizer is not on PATH; $tool is left out."
    return 0
  fi
  PYTHONSAFEPATH=1 timeout 80 compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 \
    "$python" -m pytest -q -x -p no:cacheprovider \
    "tests/triton/test_row_gpu.py::test_same_bits_twice" \
    "tests/triton/test_channel_gpu.py::test_parts_of_batch_norm" >"$out/$tool.log" 2>&1 &&
    echo "compute-sanitizer $tool: clean" || {
    echo "compute-sanitizer $tool: status $?; see $out/$tool.log"
    return 1
  }
}

status=0
case "$piece" in
  check)
    timeout 75 "$python" -m fused doctor --json >"$out/doctor.json" || status=1
    test_on_gpu || status=1
    sanitize memcheck || status=1
    sanitize racecheck || status=1
    ;;
  tune)
    timeout 80 "$python" -m bench.latency layer batch --device cuda | tee "$out/latency.md" || status=1
    "$python" -m fused tune --out "$out/tuning.json" --max-seconds 450 || status=1
    ;;
  peers)
    "$python" -c 'from bench.peers import missing_peers
for name in missing_peers(): print(f"peers: {name} cannot be imported here; it is left out.")'
    "$python" -m bench peers --device cuda --seconds 0.5 --max-seconds 480 --out "$out" || status=1
    ;;
  blocks)
    "$python" -m bench blocks --device cuda --seconds 0.5 --max-seconds 480 --max-autotune \
      --out "$out" || status=1
    ;;
  *)
    "$python" -m bench "$piece" --device cuda --seconds 0.4 --max-seconds 480 --out "$out" ||
      status=1
    ;;
esac
exit $status
