#!/usr/bin/env bash
# With a CUDA device and torchvision: builds the kernels, runs the tests that need a GPU, the parity check, the benchmarks
# beside torchvision and 50 training steps three ways, and writes all of it into one JSON; some 20 minutes on an H200.
#   bash test/gpu_check.sh [--out FILE]      default: docs/measurements/gpu_check_NAME_OF_THE_GPU.json
# Exit status 0: every stage went through; 1: one failed, and the JSON says which; 2: no CUDA device.
# shellcheck disable=SC1091
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
find_python || fail "no interpreter with the project's dependencies; run test/run_tests.sh first"
cd "$ROOT"
"$PYTHON" -m maskrcnn_benchmark.device cuda
exec "$PYTHON" "$ROOT/test/gpu_check.py" "$@"
