# shellcheck shell=bash disable=SC1091
# Sourced by the scripts here. Sets ROOT, the checkout, and PYTHON, an interpreter with the project's dependencies:
# $PYTHON where it is given, else the active environment's, else the checkout's own .venv.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# What interpreter $1 cannot import of the project's dependencies and the further modules named.
lacks() {
    "$1" - torch numpy yacs yaml cv2 PIL pycocotools orjson tensorboard tqdm "${@:2}" <<'CODE'
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name if isinstance(error, ModuleNotFoundError) else f"{name} ({error})", end=" ")
CODE
}

# find_python [MODULE ...]: an interpreter that has these too; else LACKING says what each one lacks.
find_python() {
    local candidate missing
    LACKING=""
    for candidate in "${PYTHON:-}" python python3 "$VENV/bin/python"; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null; then
            if missing="$(lacks "$candidate" "$@" 2>&1)" && [ -z "$missing" ]; then
                PYTHON="$(command -v "$candidate")"
                return 0
            fi
            LACKING+="${LACKING:+; }$candidate lacks ${missing% }"
        fi
    done
    return 1
}

# For the scripts that may install: an environment of the checkout's own, and the kernels built in place.
prepare_environment() {
    if ! find_python "$@"; then
        local base
        base="$(command -v python3 || command -v python)" || fail "no python3 found; install Python 3.10 or later"
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$base is older than Python 3.10"
        echo "== setting up $VENV: torch is a large download"
        [ -x "$VENV/bin/python" ] || "$base" -m venv "$VENV"
        PYTHON="$VENV/bin/python"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt"
    fi
    echo "== building the kernels, where they are not up to date"
    if ! (cd "$ROOT" && "$PYTHON" setup.py --quiet build_ext --inplace >"$ROOT/build.log" 2>&1); then
        cat "$ROOT/build.log" >&2
        fail "building the kernels failed; the log is above and in $ROOT/build.log"
    fi
    grep -i 'warning: maskrcnn' "$ROOT/build.log" >&2 || true
}
