#!/usr/bin/env bash
# shellcheck disable=SC1091,SC2034
# Train the configuration's schedule on eight devices and evaluate: bash test/train_full_8p.sh --data_path=DIR
set -euo pipefail
RANKS=8 TOOL=train_net.py
FIXED=(LOGGING.NETWORK MaskRCNN)
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
