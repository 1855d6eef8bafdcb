#!/usr/bin/env bash
# Several machines from a hostfile: the deepspeed command line for `megatron_patch run`. See --help and docs/launch.md.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$here/common.sh"

usage() {
    cat << 'EOF'
Train on several machines with the deepspeed launcher: started once, over ssh and pdsh, or on every machine with --no-ssh.

usage: launch/pretrain_multinode.sh --config FILE.yaml --hostfile FILE [option ...] [flag ...]

  --config FILE       flags as YAML (required); flags on the command line win
  --hostfile FILE     one line "HOST slots=GPUS" per machine (required); the first one holds rank 0
  --master-addr A     address of the first machine that the others reach; default: first word of `ssh HOST hostname -I`
  --master-port P     default 29500
  --ssh-port P        port of sshd on every machine, where it is not 22 and ~/.ssh/config does not say so
  --env NAME[=VALUE]  forward this variable to every machine as well; may be repeated
  --no-ssh            start the ranks of this machine only; run the same command on every machine, each with its
  --node-rank K       line number in the hostfile, from 0
  --log-dir DIR       one log file per rank instead of one stream; with ssh in a folder per machine, DIR/HOST
  --restarts N        go on from the last checkpoint after a crash, at most N times; --load must be --save
  --hang-timeout S    seconds that a step may take before the run counts as hung and is ended; 0: for ever.
                      Default: 5 times the slowest step so far, at least 300
  --hang-timeout-slow S   the same for the start with its first steps, for a checkpoint and for the end; default 1800
  --no-doctor         do not compare the machines before the start
  --help

Everything else goes to `megatron_patch run` as it is: [SCRIPT.py], Megatron's flags, megatron_patch's flags.

With ssh, the code, the Python environment, the config and the data must be at the same paths on every machine.
Forwarded without asking, where set: CUDA_DEVICE_MAX_CONNECTIONS, OMP_NUM_THREADS, LD_LIBRARY_PATH, DS_ACCELERATOR,
TORCHDYNAMO_DISABLE, NCCL_*, NVTE_*, GLOO_*, TORCH_*, PYTORCH_* (PYTHON* and UCX* by DeepSpeed itself), and the lines of
~/.deepspeed_env and ./.deepspeed_env. Values are visible in process lists and logs: no secrets.

example: launch/pretrain_multinode.sh --hostfile hosts --config configs/target_7b_h100_bf16.yaml \
             --data-path /data/corpus --tokenizer-model /data/llama.model --save /runs/7b
EOF
}

config=""
hostfile=""
master_addr=""
ssh_port=""
node_rank=""
master_port=29500
log_dir=""
ssh=true
watch=()
environment=()
launcher=()
flags=()
while (($#)); do
    case "$1" in
        --config=* | --hostfile=* | --master-addr=* | --master-port=* | --ssh-port=* | --env=* | \
            --node-rank=* | --log-dir=* | --restarts=* | \
            --hang-timeout=* | --hang-timeout-slow=*)
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
            continue
            ;;
        --config) need "$@" && config="$2" ;;
        --hostfile) need "$@" && hostfile="$2" ;;
        --master-addr) need "$@" && master_addr="$2" ;;
        --master-port) need "$@" && master_port="$2" && launcher+=(--master_port "$2") ;;
        --ssh-port) need "$@" && ssh_port="$2" ;;
        --env) need "$@" && environment+=("$2") ;;
        --node-rank) need "$@" && node_rank="$2" ;;
        --log-dir) need "$@" && log_dir="$2" ;;
        --restarts) need "$@" && check_number "$1" "$2" && watch+=(--restarts "$2") ;;
        --hang-timeout | --hang-timeout-slow) need "$@" && check_seconds "$1" "$2" && watch+=("$1" "$2") ;;
        --no-doctor)
            watch+=(--no-doctor)
            shift
            continue
            ;;
        --no-ssh)
            ssh=false
            shift
            continue
            ;;
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
[[ -n "$hostfile" ]] || die "--hostfile is missing: give a file with one line \"HOST slots=GPUS\" per machine"
[[ -z "$node_rank" || "$node_rank" =~ ^[0-9]+$ ]] || die "--node-rank $node_rank: expected an integer from 0"
check_hostfile "$hostfile" "$node_rank"

# Tensor and context parallelism need it on GPUs before Blackwell; Megatron stops without it.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
for setting in "${environment[@]}"; do
    name="${setting%%=*}"
    [[ "$name" =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || die "--env $setting: expected NAME or NAME=VALUE"
    if [[ "$setting" == *=* ]]; then
        export "${setting?}"
    elif [[ -z "${!name+set}" ]]; then
        die "--env $setting: the variable is not set here; give --env $setting=VALUE"
    fi
done
[[ "$master_port" =~ ^[1-9][0-9]{0,4}$ ]] || die "--master-port $master_port: expected 1 to 65535"
[[ -z "$master_addr" ]] || launcher=(--master_addr "$master_addr" "${launcher[@]}")
run=(--no_local_rank --module megatron_patch run --config "$config" "${flags[@]}")

if [[ "$ssh" == false ]]; then
    [[ -n "$node_rank" ]] || die "--no-ssh needs --node-rank K, this machine's line in $hostfile from 0"
    [[ -z "$ssh_port" ]] || die "--ssh-port $ssh_port: nothing goes over ssh with --no-ssh; drop one of them"
    # Without it DeepSpeed asks the first host over ssh, --no_ssh or not.
    [[ -n "$master_addr" ]] || die "--no-ssh needs --master-addr, the address of the first machine"
    [[ -z "$log_dir" ]] || launcher+=(--enable_each_rank_log "$log_dir") watch+=(--log-dir "$log_dir")
    run_watched --hostfile "$hostfile" --node-rank "$node_rank" --master-addr "$master_addr" \
        --master-port "$master_port" "${watch[@]}" -- deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$node_rank" "${launcher[@]}" "${run[@]}"
fi

[[ -z "$node_rank" ]] || die "--node-rank $node_rank: only together with --no-ssh"
command -v pdsh > /dev/null || die "pdsh is not on PATH: install it, or start every machine with --no-ssh"

if [[ -n "$ssh_port" ]]; then
    if [[ ! "$ssh_port" =~ ^[1-9][0-9]{0,4}$ ]] || ((ssh_port > 65535)); then
        die "--ssh-port $ssh_port: expected 1 to 65535"
    fi
    launcher=(--ssh_port "$ssh_port" "${launcher[@]}")
    watch+=(--ssh-port "$ssh_port")
fi

# With one host DeepSpeed would start the ranks here, whichever host it is.
((hosts_in_file > 1)) || launcher=(--force_multi "${launcher[@]}")

# pdsh hands the command to a shell on every machine, DeepSpeed quotes nothing but spaces, and pdsh expands %.
harmless='^[A-Za-z0-9 _@+=:,./^-]*$'
[[ "$PWD" =~ $harmless && "$PWD" != *" "* ]] || die "the working directory $PWD: a remote shell would take it apart"
for word in "$config" "${flags[@]}"; do
    [[ -n "$word" && "$word" =~ $harmless ]] \
        || die "argument '$word' would not survive the remote shell: put it into the YAML file, or use --no-ssh"
done

if [[ -n "$log_dir" ]]; then
    [[ "$log_dir" =~ $harmless && "$log_dir" != *" "* ]] \
        || die "--log-dir $log_dir: a remote shell would take it apart; give a name of letters, digits and . _ - /"
    # pdsh puts each machine's name for %h: the files' own names do not say where a rank was.
    launcher+=(--enable_each_rank_log "$log_dir/%h")
    watch+=(--log-dir "$log_dir/%h")
fi

# DeepSpeed forwards few variables; the rest go through the file it calls .deepspeed_env. It chokes on comments and blank
# lines in it and does not escape values, so every line is checked here and written to a file of our own.
env_file="$(mktemp)"
trap 'rm -f "$env_file"' EXIT
forward() { # NAME VALUE ORIGIN
    [[ "$1" =~ ^[A-Za-z_][A-Za-z0-9_]*$ && "$2" =~ $harmless ]] \
        || die "$3: $1=$2 would not survive the remote shell; unset it, or set it in the machines' own shell start-up"
    printf '%s=%s\n' "$1" "$2" >> "$env_file"
}
while IFS= read -r name; do
    case "$name" in
        CUDA_DEVICE_MAX_CONNECTIONS | OMP_NUM_THREADS | LD_LIBRARY_PATH | DS_ACCELERATOR | TORCHDYNAMO_DISABLE | \
            NCCL_* | NVTE_* | GLOO_* | TORCH_* | PYTORCH_*)
            forward "$name" "${!name}" "environment"
            ;;
    esac
done < <(compgen -e)
for file in ~/.deepspeed_env .deepspeed_env; do
    [[ -f "$file" ]] || continue
    mapfile -t lines < "$file"
    for number in "${!lines[@]}"; do
        line="${lines[number]}"
        where="$file line $((number + 1))"
        [[ "$line" =~ ^[[:space:]]*(#.*)?$ ]] && continue
        check_visible "$where" "$line"
        [[ "$line" == *=* ]] || die "$where: '$line': expected NAME=VALUE; add the value, or delete the line"
        forward "${line%%=*}" "${line#*=}" "$where"
    done
done
for setting in "${environment[@]}"; do
    name="${setting%%=*}"
    forward "$name" "${!name}" "--env"
done

# The program that runs the command removes the file, so no trap must.
run_watched --hostfile "$hostfile" --master-port "$master_port" --env-file "$env_file" "${watch[@]}" \
    -- deepspeed --hostfile "$hostfile" "${launcher[@]}" "${run[@]}"
