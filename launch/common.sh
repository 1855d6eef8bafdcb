# Sourced by pretrain.sh and pretrain_multinode.sh; not a command of its own.
# shellcheck shell=bash

die() {
    echo "${0##*/}: $*" >&2
    exit 2
}

# need "$@": the option in $1 has a value after it.
need() {
    (($# > 1)) || die "$1 needs a value; see --help"
}

# What both scripts ask for before they start anything.
check_start() { # CONFIG
    [[ -n "$1" ]] || die "--config is missing: give the YAML file to train from, e.g. configs/paper_llama_w128.yaml"
    [[ -f "$1" ]] || die "--config $1: no such file"
    command -v deepspeed > /dev/null || die "deepspeed is not on PATH: activate the environment it is installed in"
}

# A hostfile that cannot exist, for one machine: without --hostfile DeepSpeed reads /job/hostfile, which cluster operators
# write on every node, and would start the hosts in it over ssh.
# shellcheck disable=SC2034  # pretrain.sh has it
no_hostfile=/dev/null/no-hostfile

# Refuse a line in which something is that cannot be seen, as Windows editors leave it behind.
check_visible() { # WHERE LINE
    local LC_ALL=C
    [[ "$2" != *$'\r'* ]] || die "$1: it has an invisible carriage return at its end, as Windows editors write it;" \
        "remove them: sed -i 's/\\r\$//' ${1% line *}"
    [[ "$2" != *[^[:print:][:space:]]* ]] || die "$1: $(printf %q "$2"): expected plain ASCII; type the line anew"
}

# DeepSpeed ends in a traceback, exit code 1, at what is refused here; `slots=8x` it would take for 8. Sets hosts_in_file.
check_hostfile() { # FILE [NODE_RANK]
    local file="$1" rank="${2:-}" line where host number=0 nodes=0
    local -A seen=()
    [[ -f "$file" ]] || die "--hostfile $file: no such file"
    while IFS= read -r line || [[ -n "$line" ]]; do
        number=$((number + 1))
        where="$file line $number"
        [[ "$line" =~ ^[[:space:]]*(#.*)?$ ]] && continue
        check_visible "$where" "$line"
        [[ "$line" =~ ^[[:space:]]*([^[:space:]#]+)[[:space:]]+slots=[1-9][0-9]*([[:space:]].*)?$ ]] \
            || die "--hostfile $where: '$line': expected \"HOST slots=GPUS\", e.g. \"node1 slots=8\"; correct the line"
        host="${BASH_REMATCH[1]}"
        [[ -z "${seen[$host]:-}" ]] \
            || die "--hostfile $where: $host is in line ${seen[$host]} too: expected each host once; delete one of the lines"
        seen[$host]="$number"
        nodes=$((nodes + 1))
    done < "$file"
    # shellcheck disable=SC2034  # pretrain_multinode.sh has it
    hosts_in_file=$nodes
    ((nodes > 0)) || die "--hostfile $file: no line \"HOST slots=GPUS\": expected one per machine; write them"
    [[ -z "$rank" ]] || ((10#$rank < nodes)) \
        || die "--node-rank $rank: expected 0 to $((nodes - 1)), since $file has $nodes hosts; count its lines from 0"
}

# Whether a process of this group is alive; a zombie is not.
group_alive() { # PGID
    ps -A -o pgid=,stat= 2> /dev/null | awk -v group="$1" '$1 == group && $2 !~ /^Z/ { found = 1 } END { exit !found }'
}

show() { # COMMAND...
    printf '+'
    printf ' %q' "$@"
    echo
}

# Echo the command, run it in a process group of its own, exit with its code. It does two things that the deepspeed
# command (0.19.8) does not do on one node: a signal reaches launch.py and the ranks, not only the runner; and exit
# code 0 is not believed while ranks are still alive, which is how it ends when launch.py was killed for lack of memory.
run_watched() { # COMMAND...
    local group status=0 patience="${LAUNCH_PATIENCE:-30}"
    show "$@"
    set -m
    "$@" < /dev/null &
    group=$!
    set +m
    # DeepSpeed's launch.py gives the ranks 30 seconds after SIGTERM.
    trap 'patience=60; kill -TERM -- "-$group"' INT TERM HUP
    wait "$group" || status=$?
    while ((patience-- > 0)) && group_alive "$group"; do sleep 1; done
    if group_alive "$group"; then
        echo "${0##*/}: processes outlived the launcher and were killed; was launch.py killed for lack of memory?" >&2
        kill -KILL -- "-$group" || true
        ((status != 0)) || status=1
    fi
    exit "$status"
}

# The Python that the deepspeed command is run by: its first line names it.
python_of_deepspeed() {
    local first="" found
    found="$(command -v deepspeed)"
    IFS= read -r first < "$found" || true
    first="${first#\#!}"
    if [[ -x "$first" && "${first##*/}" == python* ]]; then
        echo "$first"
    elif [[ -x "${found%/*}/python" ]]; then
        echo "${found%/*}/python"
    else
        command -v python3 || die "no python beside $found: activate the environment it is installed in"
    fi
}
