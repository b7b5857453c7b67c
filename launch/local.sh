#!/usr/bin/env bash
# usage: launch/local.sh [--config NAME] [--processes N] [--restarts N] RUN.yaml [key.path=value ...] [--overwrite]
#
# All GPUs of this machine, one process each.
#   --config NAME    configs/accelerate/NAME.yaml, or a file          default: ddp; cpu_2 where there is no GPU
#   --processes N    processes                                        default: one a GPU; without GPUs the config's own
#   --restarts N     start again after a rank has died, up to N times, with --resume     default: 0
# One process and no --config: no launcher, as launch/single.sh.
# What follows goes to `phi3-dist train`, or to `phi3-dist sweep` where the file has a section `sweep`.
# The exit code is 0 only if every process ended well.

set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

config='' processes='' restarts=0
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --config) needs_value "$@" && config=$2 && shift 2 ;;
        --processes) needs_value "$@" && processes=$2 && shift 2 ;;
        --restarts) needs_value "$@" && restarts=$2 && shift 2 ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || fail "no run file" "launch/local.sh configs/run/debug.yaml"
whole_number --restarts "$restarts" 0
[ -z "$processes" ] || whole_number --processes "$processes" 1

gpus=$(gpu_count)
[ -n "$processes" ] || [ "$gpus" = 0 ] || processes=$gpus
verb=$(verb_of "$1")
one_process() { shift && exec python -m phi3_dist "$verb" "$@"; }
# port 0: any free one, for two runs on one machine must not meet
all_processes() {
    shift
    exec python -m phi3_dist launch --config_file "$config" --num_machines 1 --machine_rank 0 --main_process_port 0 \
        ${processes:+--num_processes "$processes"} -m phi3_dist "$verb" "$@"
}
start=all_processes
if [ -z "$config" ]; then
    [ "${processes:-1}" -gt 1 ] || start=one_process
    [ "$gpus" = 0 ] && config=cpu_2 || config=ddp
fi
config=$(config_path "$config")
[ "$start" = one_process ] || check_run "$@"
[ "$restarts" = 0 ] || supervise "$restarts" "$start" "$@"
"$start" 0 "$@"
