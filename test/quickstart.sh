#!/usr/bin/env bash
# shellcheck disable=SC1091,SC2034
# From a fresh clone to a trained Mask R-CNN: environment, kernels, a generated data set, training, evaluation, pictures.
# At most 15 minutes on two CPU cores, installation included.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

device=auto output="$ROOT/output/quickstart" overrides=()
for argument in "$@"; do
    case "$argument" in
        --help | -h) echo "usage: bash $0 [--device=auto|cpu|cuda|npu] [--output=DIR] [KEY VALUE ...]"; exit 0 ;;
        --device=*) device="${argument#*=}" ;;
        --output=*) output="${argument#*=}" ;;
        --*) fail "unknown option $argument; bash $0 --help lists them" ;;
        *) overrides+=("$argument") ;;
    esac
done

prepare_environment
data="$output/data"
if [ ! -d "$data" ]; then
    echo "== generating a data set in $data"
    "$PYTHON" "$ROOT/tools/dataset.py" generate "$data" --train 800 --val 100 --size 192 192 --seed 1
fi
echo "== training"
"$PYTHON" "$ROOT/tools/train_net.py" --config-file "$ROOT/configs/quickstart.yaml" --device "$device" \
    DATA.PATH "$data" OUTPUT_DIR "$output" "${overrides[@]}"
echo "== predicting on a few images"
pictures=("$data"/val2017/*.jpg)
"$PYTHON" "$ROOT/tools/predict.py" "${pictures[@]:0:8}" --weights "$output/model_final.pth" --device "$device" \
    --output "$output/pictures" --json "$output/pictures/predictions.json"
cat <<TEXT
== done; look at
   $output/pictures/           what the model sees: the masks on eight pictures
   $output/report.html         the run on one page: curves, accuracy by class, predictions beside the truth
   $output/result.json         accuracy, speed, environment
   $output/log.txt             the log; tensorboard --logdir $output draws the curves
TEXT
