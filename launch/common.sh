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

check_number() { # OPTION VALUE
    [[ "$2" =~ ^[0-9]+$ ]] || die "$1 $2: expected an integer >= 0"
}

check_seconds() { # OPTION VALUE
    [[ "$2" =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "$1 $2: expected a number of seconds, e.g. 600"
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

show() { # COMMAND...
    printf '+'
    printf ' %q' "$@"
    echo
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

# Echo the command and become a program of ours that runs it, watches its ranks, ends what is left of them, and says in
# one line why a run failed. OPTIONS are its own.
run_watched() { # OPTIONS -- COMMAND...
    local python options=()
    while [[ "$1" != -- ]]; do
        options+=("$1")
        shift
    done
    python="$(python_of_deepspeed)"
    show "${@:2}"
    # shellcheck disable=SC2154  # the scripts set it
    exec "$python" "$here/supervise.py" --name "${0##*/}" "${options[@]}" "$@"
}
