#!/usr/bin/env bash
# shellcheck disable=SC1091,SC2034
# Evaluate a checkpoint on eight devices: bash test/train_eval_8p.sh --data_path=DIR --ckpt=FILE
set -euo pipefail
RANKS=8 TOOL=test_net.py
FIXED=()
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
