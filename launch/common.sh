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

# Whether a process of this group is alive; a zombie is not.
group_alive() { # PGID
    ps -A -o pgid=,stat= 2> /dev/null | awk -v group="$1" '$1 == group && $2 !~ /^Z/ { found = 1 } END { exit !found }'
}

# Echo the command, run it in a process group of its own, exit with its code. It does two things that the deepspeed
# command (0.19.8) does not do on one node: a signal reaches launch.py and the ranks, not only the runner; and exit
# code 0 is not believed while ranks are still alive, which is how it ends when launch.py was killed for lack of memory.
run_watched() { # COMMAND...
    local group status=0 patience="${LAUNCH_PATIENCE:-30}"
    printf '+'
    printf ' %q' "$@"
    echo
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
