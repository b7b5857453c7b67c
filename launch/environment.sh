# shellcheck shell=bash
# Sourced by the launchers. Sets ROOT (the folder above launch/: a clone, or a project that `phi3-dist init` made) and puts its .venv first on PATH, unless an environment is active.

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# conda's "base" is switched on by every login shell, so it is nobody's choice
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ] && [ -x "$ROOT/.venv/bin/python" ]; then
    PATH=$ROOT/.venv/bin:$PATH
fi

# a signal before anything is begun: the exit code of a run that may be started again, as from `phi3-dist train`
trap 'exit 75' TERM USR1 HUP
trap 'exit 130' INT

# fail MESSAGE [FIX]: a mistake in the command line ends with 2, as everywhere in phi3-dist
fail() {
    echo "$(basename -- "$0"): $1" >&2
    [ $# -lt 2 ] || echo "    fix: $2" >&2
    exit 2
}

# usage: the comment block at the head of the calling script
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# needs_value "$@": an option comes first and its value second
needs_value() { [ $# -gt 1 ] || fail "$1 needs a value"; }

# gpu_count: GPUs that a process started here would see
gpu_count() {
    local ids
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        IFS=, read -r -a ids <<<"$CUDA_VISIBLE_DEVICES"
        echo "${#ids[@]}"
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

# whole_number NAME VALUE LOWEST
whole_number() {
    if ! [[ $2 =~ ^[0-9]+$ ]] || [ "$2" -lt "$3" ]; then fail "$1 must be a whole number from $3 on, not '$2'"; fi
}

# config_path NAME: the Accelerate config of that name, or a file as it is named
config_path() {
    local path=$ROOT/configs/accelerate/$1.yaml
    [ -f "$path" ] || path=$1
    [ -f "$path" ] || fail "no Accelerate config '$1'" "one of: $(cd "$ROOT/configs/accelerate" && echo *.yaml | sed 's/\.yaml//g')"
    echo "$path"
}

# verb_of RUN.yaml: what trains this file, `sweep` where it has a section of that name
verb_of() {
    if grep -qsE "^[\"']?sweep[\"']?[[:space:]]*:" "$1"; then echo sweep; else echo train; fi
}

# check_run RUN.yaml …: the run file and its overrides are read once before a launcher starts: a mistake is reported at
# once, by one process, with the exit code and message of the run.
check_run() {
    local words=() word
    for word in "$@"; do case $word in *=*) words+=("$word") ;; esac done
    python -m phi3_dist config show "$1" ${words[@]+"${words[@]}"} >/dev/null || exit
}

# supervise RESTARTS FUNCTION ARGS…: `FUNCTION ATTEMPT ARGS…` until it ends well, at most RESTARTS times more, each time
# with --resume. A new launcher each time: torchrun's own --max_restarts keeps the store in which gloo's ranks then find
# the addresses of the dead (torch 2.13). A signal is handed on, and ends it; so does an exit code that another start
# would give again: 2 to 9 (a mistake in the run file, the data, the machine, …), 75, 130 and 143 (stopped by a signal).
supervise() {
    local restarts=$1 function=$2 attempt=0 status stopped='' child=''
    shift 2
    trap 'stopped=1; kill -TERM "$child" 2>/dev/null || true' TERM HUP
    trap 'stopped=1; kill -USR1 "$child" 2>/dev/null || true' USR1
    trap 'stopped=1; kill -INT "$child" 2>/dev/null || true' INT
    case " $* " in *" --resume "*) ;; *) set -- "$@" --resume ;; esac
    while :; do
        [ -z "$stopped" ] || exit 75
        "$function" "$attempt" "$@" &
        child=$!
        while :; do
            status=0
            wait "$child" || status=$?
            kill -0 "$child" 2>/dev/null || break
        done
        case $status in 0 | [2-9] | 75 | 130 | 143) exit "$status" ;; esac
        [ -z "$stopped" ] && [ "$attempt" -lt "$restarts" ] || exit "$status"
        attempt=$((attempt + 1))
        echo "$(basename -- "$0"): ended with $status; restart $attempt of $restarts, from the last checkpoint" >&2
    done
}
