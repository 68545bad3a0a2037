#!/usr/bin/env bash
# shellcheck disable=SC1091,SC2034
# The test suite, in an environment that this script sets up where there is none. Arguments go on to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment pytest,hypothesis
cd "$ROOT"
exec "$PYTHON" -m pytest "$@"
