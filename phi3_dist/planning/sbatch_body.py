"""The part of a training job that is the same in every sbatch script: from the allocation to the exit code.

`sbatch_script.py` puts directives and settings above it; `launch/slurm/train.sbatch` holds the same text, and a test
compares the two. Settings it reads: VERB (train or sweep), CONFIG, NODES, PROCESSES, MASTER, MAX_REQUEUES,
AT_LIMIT, ENV_FILE, LOG_STEM, SRUN_FLAGS and ARGS. Exit codes are those of `phi3_dist.errors`: 5 where the allocation
isn't what was planned.
"""

from __future__ import annotations

__all__ = ["JOB_BODY", "STOPPED_EARLY"]

STOPPED_EARLY = 75
"""Exit code of a run that stopped after its checkpoint (EX_TEMPFAIL of sysexits.h), and of its job where nothing goes
on with it."""

JOB_BODY = r"""
# ---- one launcher a node; the same text in every job of this toolkit ------------------------------------------------
set -uo pipefail

JOB=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
LOGS=$LOG_STEM-$JOB.ranks
RESTARTS=${SLURM_RESTART_COUNT:-0}

say() { echo "[job $JOB] $*"; }
refuse() { # MESSAGE FIX
    printf '[job %s] refused: %s\n    fix: %s\n' "$JOB" "$1" "$2" >&2
    exit 5
}

# await PID: its exit code, however often a trap (which sets woken) interrupts the wait
await() {
    local status
    while :; do
        woken=
        wait "$1"
        status=$?
        [ -n "$woken" ] || return "$status"
    done
}

# address_of NAME: an address that other nodes can reach, or nothing
address_of() {
    local found
    found=$(getent ahostsv4 "$1" | awk '{ print $1; exit }')
    [ -n "$found" ] || found=$(getent ahosts "$1" | awk '{ print $1; exit }')
    case $found in 127.* | ::1 | "") return 1 ;; esac
    echo "$found"
}

# find_master: the first node's address, by name or, where its name is loopback to itself, as Slurm knows it
find_master() {
    local name address
    name=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
    address=$(scontrol show node "$name" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    address_of "$name" || address_of "$address"
}

port_taken() {
    (: <>"/dev/tcp/127.0.0.1/$1") 2>/dev/null || (: <>"/dev/tcp/$MASTER/$1") 2>/dev/null
}

# free_port: from one that the job id chooses, the first of 20 that nobody listens on
free_port() {
    local first=$((20000 + SLURM_JOB_ID % 10000)) port
    for ((port = first; port < first + 20; port++)); do
        port_taken "$port" || { echo "$port" && return; }
    done
    return 1
}

# run_rank ARGS…: rank 0 writes to the job's output, every other rank to a file of its own. A rank that saved and
# stopped (75) ends well for the launcher, which would kill the others for any other code, amid their last words.
# shellcheck disable=SC2317,SC2329 # called on the nodes
run_rank() {
    local log code
    # shellcheck disable=SC2153 # set by the launcher
    log=$(printf '%s/rank_%03d.%s.log' "$LOGS" "$RANK" "${SLURMD_NODENAME:-$(hostname)}")
    [ "$RANK" = 0 ] || exec >>"$log" 2>&1
    python -m phi3_dist "$VERB" "$@"
    code=$?
    [ "$code" = 75 ] || exit "$code"
    [ "$RANK" != 0 ] || : >"$LOGS/stopped"
    exit 0
}

# run_node ARGS…: this node's launcher. It must not see USR1, which would kill it, nor TERM, after which it kills its
# ranks within 30 s, whatever the grace time: the ranks handle both, as soon as they train.
# shellcheck disable=SC2317,SC2329 # called on the nodes
run_node() {
    local have=${SLURM_GPUS_ON_NODE:-$PROCESSES} rank
    if [ -n "$ENV_FILE" ]; then
        # shellcheck disable=SC1090
        . "$ENV_FILE" || exit 8
    elif [ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ]; then
        PATH=$PWD/.venv/bin:$PATH
    fi
    if [ "$have" != "$PROCESSES" ]; then
        refuse "$SLURMD_NODENAME has $have GPUs in this job, the plan is $PROCESSES processes on every node" \
            "ask for --gpus-per-node=$PROCESSES (--gpus and --ntasks can spread unevenly)"
    fi
    trap 'woken=1; : >"$LOGS/stop"' USR1 TERM
    rank="$(declare -p VERB LOGS); $(declare -f run_rank); run_rank \"\$@\""
    (
        trap '' USR1 TERM
        # torchrun's own option; accelerate has none for it
        export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT
        if [ "$((NODES * PROCESSES))" = 1 ]; then RANK=0 run_rank "$@"; fi
        exec accelerate launch --config_file "$CONFIG" --num_machines "$NODES" --machine_rank "$SLURM_NODEID" \
            --num_processes "$((NODES * PROCESSES))" --main_process_ip "$MASTER" --main_process_port "$PORT" \
            --same_network --rdzv_backend static --deepspeed_multinode_launcher standard \
            --no_python bash -c "$rank" rank "$@"
    ) &
    await $!
}

# nudge: says it again to ranks that were still starting when they were asked to stop, and so didn't hear it
nudge() {
    trap '' USR1 TERM
    while sleep 10; do
        [ ! -e "$LOGS/stop" ] || scancel --signal=USR1 "$JOB" 2>/dev/null
    done
}

# preempted: Slurm tells the tasks (TERM) and not this script, and calls a job that ends within the grace time finished
preempted() {
    local facts start when
    facts=$(scontrol show job "$JOB" 2>/dev/null)
    start=$(sed -n 's/.* StartTime=\([0-9T:-]*\).*/\1/p' <<<"$facts")
    when=$(sed -n 's/.*PreemptTime=\([0-9T:-]*\).*/\1/p' <<<"$facts")
    # not the preemption of an earlier start
    [ -n "$when" ] && [[ ! $when < $start ]]
}

# after_stop CODE: a run that was asked to stop continues as the same job, at most MAX_REQUEUES times, from here alone
after_stop() {
    local state
    state=$(squeue -h -j "$JOB" -o %T 2>/dev/null)
    # cancelled, or requeued by Slurm itself
    [ "$state" = RUNNING ] || exit "$1"
    if [ "$STOP" = limit ] && [ "$AT_LIMIT" = next ]; then
        say "stopped before the time limit; the next job of the chain continues" && exit "$1"
    fi
    case " ${ARGS[*]} " in
        *" --resume "*) ;;
        *) say "stopped early; not requeued, since the run has no --resume" && exit "$((${1} ? ${1} : 75))" ;;
    esac
    if ((RESTARTS >= MAX_REQUEUES)); then
        say "stopped early; requeued $RESTARTS times, which is the limit" && exit "$((${1} ? ${1} : 75))"
    fi
    trap '' TERM USR1
    say "stopped early; requeued ($((RESTARTS + 1)) of $MAX_REQUEUES)"
    scontrol requeue "$JOB" && exit 0
    say "Slurm refused the requeue" && exit "$((${1} ? ${1} : 75))"
}

[ "$SLURM_JOB_NUM_NODES" = "$NODES" ] ||
    refuse "the job got $SLURM_JOB_NUM_NODES nodes, the plan is $NODES" "sbatch --nodes=$NODES"
[ -f "$CONFIG" ] || refuse "no Accelerate config $CONFIG in $PWD" "submit from the folder it is named from"
((RESTARTS <= MAX_REQUEUES)) ||
    refuse "restarted $RESTARTS times, the limit is $MAX_REQUEUES" "look for the cause above"
if ((NODES > 1)); then
    if [ -n "$MASTER" ]; then
        given=$MASTER
        MASTER=$(address_of "$given") ||
            refuse "master $given can't be resolved or is loopback" "an address of the first node"
        case " $(hostname -I) " in
            *" $MASTER "*) ;;
            *) refuse "master $given is not an address of the first node, $(hostname)" "one of $(hostname -I)" ;;
        esac
    else
        MASTER=$(find_master) ||
            refuse "the first node's name and address are loopback" "give its address as the master"
    fi
else
    MASTER=127.0.0.1
fi
PORT=$(free_port) || refuse "20 ports from $((20000 + SLURM_JOB_ID % 10000)) on are taken" "end what listens there"
mkdir -p "$LOGS" && rm -f "$LOGS/stop" "$LOGS/stopped"
# from Slurm 22.05 on a step no longer inherits this
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
say "$NODES x $PROCESSES processes on $SLURM_JOB_NODELIST, master $MASTER:$PORT, other ranks' logs in $LOGS"

STOP=
# the time limit is near (--signal=B:USR1@…): tell the tasks, which that signal doesn't reach
trap 'woken=1; STOP=limit; : >"$LOGS/stop"; say "time is up: asking the ranks to save and stop"
    scancel --signal=USR1 "$JOB"' USR1
# cancelled or requeued by hand: Slurm ends the tasks itself, and this script waits for them
trap 'woken=1' TERM
srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none --export=ALL \
    ${SRUN_FLAGS[@]+"${SRUN_FLAGS[@]}"} bash -c "
        $(declare -p VERB JOB CONFIG NODES PROCESSES MASTER PORT LOGS ENV_FILE)
        $(declare -f refuse await run_rank run_node)
        run_node \"\$@\"" node "${ARGS[@]}" &
step=$!
nudge &
nudge=$!
await "$step"
rc=$?
kill -KILL "$nudge" 2>/dev/null && wait "$nudge" 2>/dev/null
[ -n "$STOP" ] || [ ! -e "$LOGS/stop" ] || STOP=signal
! preempted || STOP=preempted
# the last step was done before the ranks could stop
[ "$rc" != 0 ] || [ -e "$LOGS/stopped" ] || STOP=
if [ "$rc" != 0 ]; then
    say "exit code $rc; the last lines of other ranks:"
    find "$LOGS" -name 'rank_*.log' | sort | head -n 4 | xargs -r tail -v -n 5
fi
[ -z "$STOP" ] || after_stop "$rc"
exit "$rc"
"""
