#!/usr/bin/env bash
# shellcheck disable=SC1091,SC2034
# The test suite, in an environment that this script sets up where there is none. Arguments go on to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment pytest hypothesis xdist
cd "$ROOT"
# A process a core, each with one thread: two halves at once took 14 minutes where one after the other took 22.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest -n auto --dist loadfile "$@"
