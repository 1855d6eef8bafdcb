#!/usr/bin/env bash
# One machine: the deepspeed command line for `megatron_patch run`. See --help and docs/launch.md.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$here/common.sh"

usage() {
    cat << 'EOF'
Train on this machine with the deepspeed launcher.

usage: launch/pretrain.sh --config FILE.yaml [option ...] [flag ...]

  --config FILE     flags as YAML (required); flags on the command line win
  --num-gpus N      ranks to start, on GPUs 0..N-1; on a CPU-only machine any N. Default: every GPU, or those in
                    CUDA_VISIBLE_DEVICES
  --gpus LIST       instead of --num-gpus: these GPUs, e.g. 2,3
  --master-port P   default 29500; two jobs on one machine need two ports
  --restarts N      go on from the last checkpoint after a crash, at most N times; --load must be --save
  --hang-timeout S  seconds that a step may take before the run counts as hung and is ended; 0: for ever.
                    Default: 5 times the slowest step so far, at least 300
  --hang-timeout-slow S   the same for the start with its first steps, for a checkpoint and for the end; default 1800
  --log-dir DIR     one log file per rank instead of one stream
  --help

Everything else goes to `megatron_patch run` as it is: [SCRIPT.py], Megatron's flags, megatron_patch's flags.

example: launch/pretrain.sh --num-gpus 8 --config configs/paper_llama_w512.yaml \
             --data-path data/dclm --tokenizer-model data/llama.model --save runs/w512
EOF
}

config=""
num_gpus=""
gpus=""
watch=()
launcher=()
flags=()
while (($#)); do
    case "$1" in
        --config=* | --num-gpus=* | --gpus=* | --master-port=* | --log-dir=* | --restarts=* | \
            --hang-timeout=* | --hang-timeout-slow=*)
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
            continue
            ;;
        --config) need "$@" && config="$2" ;;
        --num-gpus) need "$@" && num_gpus="$2" ;;
        --gpus) need "$@" && gpus="$2" ;;
        --master-port) need "$@" && launcher+=(--master_port "$2") ;;
        --restarts) need "$@" && check_number "$1" "$2" && watch+=(--restarts "$2") ;;
        --hang-timeout | --hang-timeout-slow) need "$@" && check_seconds "$1" "$2" && watch+=("$1" "$2") ;;
        --log-dir) need "$@" && watch+=(--log-dir "$2") && launcher+=(--enable_each_rank_log "$2") ;;
        --help | -h)
            usage
            exit 0
            ;;
        *)
            flags+=("$1")
            shift
            continue
            ;;
    esac
    shift 2
done

check_start "$config"
[[ -z "$num_gpus" || -z "$gpus" ]] || die "--num-gpus and --gpus: give one of them"
if [[ -n "$num_gpus" ]]; then
    [[ "$num_gpus" =~ ^[1-9][0-9]*$ ]] || die "--num-gpus $num_gpus: expected a positive integer"
    # With --num_gpus DeepSpeed drops CUDA_VISIBLE_DEVICES and takes GPUs 0..N-1, perhaps somebody else's.
    [[ -z "${CUDA_VISIBLE_DEVICES:-}" ]] \
        || die "--num-gpus with CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: DeepSpeed would ignore the variable;" \
            "unset it, or give --gpus $CUDA_VISIBLE_DEVICES instead"
    launcher=(--num_gpus "$num_gpus" "${launcher[@]}")
elif [[ -n "$gpus" ]]; then
    unset CUDA_VISIBLE_DEVICES
    launcher=(--include "localhost:$gpus" "${launcher[@]}")
fi

# Tensor and context parallelism need it on GPUs before Blackwell; Megatron stops without it.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
run=(--no_local_rank --module megatron_patch run --config "$config" "${flags[@]}")
run_watched "${watch[@]}" -- deepspeed --hostfile "$no_hostfile" "${launcher[@]}" "${run[@]}"
