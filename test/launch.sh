# shellcheck shell=bash disable=SC1091,SC2153
# Sourced by the launchers with RANKS (processes they stand for), TOOL and FIXED (arguments of the tool) set.
# Parses the options, starts the ranks, and ends with their status.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<TEXT
usage: bash $0 --data_path=DIR [--config=YAML] [--device=auto|cuda|npu|cpu] [--nproc=N]
       [--nnodes=N --node_rank=R --master_addr=A --master_port=P] [--batch_size=TOTAL] [--output=DIR]
       [--ckpt=FILE] [--resume] [KEY VALUE ...]
  DIR     a COCO directory: annotations/instances_{train,val}2017.json, train2017/, val2017/; it is only read
  nproc   processes on this node, one a device ($RANKS unless said); on a CPU any number, over gloo
  ckpt    weights to evaluate (train_eval_8p.sh)
  output  where everything is written (test/output)
  KEY VALUE  configuration keys, such as SOLVER.MAX_ITER 100
TEXT
}

config="$ROOT/configs/e2e_mask_rcnn_R_50_FPN_1x.yaml" device=auto nproc="" output="$ROOT/test/output"
nnodes=1 node_rank=0 master_addr="" master_port=29500 data_path=""
arguments=() overrides=()
for argument in "$@"; do
    value="${argument#*=}"
    case "$argument" in
        --help | -h) usage; exit 0 ;;
        --data_path=*) data_path="$value" ;;
        --config=*) config="$value" ;;
        --device=*) device="$value" ;;
        --nproc=*) nproc="$value" ;;
        --nnodes=*) nnodes="$value" ;;
        --node_rank=*) node_rank="$value" ;;
        --master_addr=*) master_addr="$value" ;;
        --master_port=*) master_port="$value" ;;
        --batch_size=*) overrides+=(SOLVER.IMS_PER_BATCH "$value") ;;
        --output=*) output="$value" ;;
        --ckpt=*) arguments+=(--ckpt "$value") ;;
        --resume) arguments+=(--resume) ;;
        --*) fail "unknown option $argument; bash $0 --help lists them" ;;
        *) overrides+=("$argument") ;;
    esac
done
[ -n "$data_path" ] || fail "--data_path=DIR is missing; DIR holds annotations/, train2017/ and val2017/"
[ -d "$data_path" ] || fail "--data_path: $data_path is not a directory"
[ -f "$config" ] || fail "--config: $config is not a file"
[[ "${nproc:-1}" =~ ^[1-9][0-9]*$ ]] || fail "--nproc: $nproc is not a number of processes"
for number in "$nnodes" "$node_rank" "$master_port"; do
    [[ "$number" =~ ^[0-9]+$ ]] || fail "--nnodes, --node_rank and --master_port must be numbers, not $number"
done
find_python || fail "no Python with the dependencies found ($LACKING); activate an environment with them, or run bash test/quickstart.sh once"

if [ "$device" = npu ] || { [ "$device" = auto ] && command -v npu-smi >/dev/null; }; then
    source "$ROOT/test/env_npu.sh"
fi
found="$("$PYTHON" -m maskrcnn_benchmark.device "$device")" || exit 2
read -r kind count <<<"$found"
if [ -z "$nproc" ]; then
    nproc="$RANKS"
    if [ "$nproc" -gt 1 ] && [ "$count" = any ]; then
        fail "$RANKS processes need $RANKS devices, but device $kind is one CPU; say how many ranks share it with --nproc=N"
    fi
fi
if [ "$count" != any ] && [ "$nproc" -gt "$count" ]; then
    fail "$nproc processes need $nproc devices, but there are $count of $kind here; ask for fewer with --nproc=$count"
fi
if [ "$kind" = cpu ]; then
    # torchrun would give each rank one thread, whatever the cores
    cores="$(nproc)"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}"
fi

mkdir -p "$output" 2>/dev/null || fail "--output: cannot create $output"
run=("$PYTHON")
if [ "$nnodes" -gt 1 ]; then
    [ -n "$master_addr" ] || fail "--nnodes=$nnodes needs --master_addr=A, the address of node 0"
    run+=(-m maskrcnn_benchmark.engine.launch --nproc-per-node "$nproc" --nnodes "$nnodes" --node-rank "$node_rank"
        --master-addr "$master_addr" --master-port "$master_port")
elif [ "$nproc" -gt 1 ]; then
    run+=(-m maskrcnn_benchmark.engine.launch --standalone --nproc-per-node "$nproc")
fi
# exec: signals reach the ranks' parent itself, and its status is ours
exec "${run[@]}" "$ROOT/tools/$TOOL" --config-file "$config" --device "$device" "${FIXED[@]}" "${arguments[@]}" \
    DATA.PATH "$data_path" OUTPUT_DIR "$output" LOGGING.RANK_LOGS True "${overrides[@]}"
