#!/usr/bin/env bash
# shellcheck disable=SC1091,SC2034
# Train 300 steps on one device for the speed alone: bash test/train_performance_1p.sh --data_path=DIR
set -euo pipefail
RANKS=1 TOOL=train_net.py
FIXED=(--skip-test LOGGING.NETWORK MaskRCNN SOLVER.MAX_ITER 300 SOLVER.MAX_EPOCHS 0 SOLVER.REFERENCE_IMS_PER_BATCH 0
    LOGGING.WARMUP_STEPS 50 SAVE_CHECKPOINTS False SOLVER.EVAL_PERIOD 0 PER_EPOCH_EVAL False "DATASETS.TEST" "()")
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
