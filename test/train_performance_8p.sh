#!/usr/bin/env bash
# Train 300 steps on eight devices for the speed alone: bash test/train_performance_8p.sh --data_path=DIR
set -euo pipefail
RANKS=8 TOOL=train_net.py
FIXED=(--skip-test LOGGING.NETWORK MaskRCNN SOLVER.MAX_ITER 300 LOGGING.WARMUP_STEPS 50 SAVE_CHECKPOINTS False)
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
