#!/usr/bin/env bash
# Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer in a copy of the tree and runs the tests of the
# operators on them; arguments go on to pytest. Any error of memory or undefined behaviour ends the run.
# shellcheck disable=SC1091
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
find_python pytest hypothesis || fail "no interpreter with the project's dependencies ($LACKING); run test/run_tests.sh first"
copy="$(mktemp -d)"
trap 'rm -rf "$copy"' EXIT
cp -r "$ROOT"/{csrc,maskrcnn_benchmark,test,setup.py,pyproject.toml} "$copy"
rm -f "$copy"/maskrcnn_benchmark/_C*
cd "$copy"
export PYTHONPATH="$copy"
sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=all"
CFLAGS="$sanitizers -fno-omit-frame-pointer" LDFLAGS="$sanitizers" MASKRCNN_REQUIRE_EXT=1 \
  "$PYTHON" setup.py --quiet build_ext --inplace
tests=("$@")
# Not those of how the kernels are loaded and how much memory they take, in processes that know nothing of sanitizers.
[ $# -gt 0 ] || tests=(test/test_ops_*.py -k "not test_ops_library and not little_memory and not float32_copy")
# Python itself is not instrumented, so the sanitizers' libraries must be loaded first. Its own leaks are not our concern.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 MASKRCNN_KERNELS=native \
  "$PYTHON" -m pytest -q -p no:cacheprovider "${tests[@]}"
