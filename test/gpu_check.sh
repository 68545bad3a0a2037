#!/usr/bin/env bash
# With a CUDA device and torchvision: builds the kernels, runs the tests that need a GPU, the parity check, the benchmarks
# beside torchvision and 50 training steps three ways, and writes all of it into one JSON; 25 minutes at most.
#   bash test/gpu_check.sh [--out FILE] [--stages NAME ...]
#       --out      default: docs/measurements/gpu_check_NAME_OF_THE_GPU.json
#       --stages   only these, and the ones that draw their images; what FILE holds of others stays. Three parts of less
#                  than ten minutes each:
#                      --stages build environment tests parity
#                      --stages ops train "train graph"
#                      --stages "train real" infer "curve eager" "curve graph" "curve cpu"
# Exit status 0: every stage went through; 1: one failed, and the JSON says which; 2: no CUDA device, or no such stage.
# shellcheck disable=SC1091
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
find_python || fail "no interpreter with the project's dependencies ($LACKING); run test/run_tests.sh first"
cd "$ROOT"
exec "$PYTHON" "$ROOT/test/gpu_check.py" "$@"
