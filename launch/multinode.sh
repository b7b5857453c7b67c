#!/usr/bin/env bash
# usage: launch/multinode.sh --nodes N --node-rank R --master HOST [options] RUN.yaml [key.path=value ...] [--overwrite]
#
# One call on every node, by hand or from a parallel shell; only --node-rank differs between the calls.
#   --nodes N                 number of nodes
#   --node-rank R             this node: 0 to N-1
#   --master HOST             name or address of node 0, as the other nodes reach it (never loopback)
#   --port P                  a free port on node 0                            default: 29500
#   --processes-per-node K    the same on every node                           default: the GPUs of this machine
#   --config NAME             configs/accelerate/NAME.yaml, or a file          default: ddp
#   --restarts N              start again after a rank of any node has died, with --resume; the same on every node.
#                             Uses the ports from P to P+N                     default: 0
# What follows goes to `phi3-dist train`, or to `phi3-dist sweep` where the file has a section `sweep`.
# The exit code is 0 only if every process of this node ended well.
# Interfaces: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME are read by NCCL and gloo themselves and left alone here.

set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

nodes='' node_rank='' master='' port=29500 processes='' config=ddp restarts=0
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --nodes) needs_value "$@" && nodes=$2 && shift 2 ;;
        --node-rank) needs_value "$@" && node_rank=$2 && shift 2 ;;
        --master) needs_value "$@" && master=$2 && shift 2 ;;
        --port) needs_value "$@" && port=$2 && shift 2 ;;
        --processes-per-node) needs_value "$@" && processes=$2 && shift 2 ;;
        --config) needs_value "$@" && config=$2 && shift 2 ;;
        --restarts) needs_value "$@" && restarts=$2 && shift 2 ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || fail "no run file" "see launch/multinode.sh --help"
whole_number --nodes "$nodes" 1
whole_number --node-rank "$node_rank" 0
whole_number --port "$port" 1
whole_number --restarts "$restarts" 0
[ "$node_rank" -lt "$nodes" ] || fail "--node-rank $node_rank, but with --nodes $nodes the last is $((nodes - 1))"
processes=${processes:-$(gpu_count)}
[ "$processes" != 0 ] || fail "no GPU on this machine" "give --processes-per-node, and --config with a CPU config"
whole_number --processes-per-node "$processes" 1
config=$(config_path "$config")

if [ "$nodes" -gt 1 ]; then
    [ -n "$master" ] || fail "--master is needed for more than one node" "the address of node 0"
    # a name that node 0 itself maps to 127.0.1.1 (as Debian does) hangs every node in silence
    address=$(getent ahosts "$master" | awk '{ print $1; exit }' || true)
    case ${address:-$master} in
        127.* | ::1 | localhost) fail "--master $master is this machine's loopback; other nodes can't reach it" \
            "the address of node 0 on the network, such as $(hostname -I | awk '{ print $1 }')" ;;
    esac
    [ -n "$address" ] || fail "--master $master can't be resolved on $(hostname)" "an address in place of the name"
fi
verb=$(verb_of "$1")
# "standard": one launcher a node for DeepSpeed too, instead of pdsh from node 0; other strategies don't read it.
# A port for each attempt: a launcher must not meet another one's last attempt.
this_node() {
    local at=$((port + $1))
    shift
    exec python -m phi3_dist launch --config_file "$config" --num_machines "$nodes" --machine_rank "$node_rank" \
        --num_processes $((nodes * processes)) --main_process_ip "${master:-127.0.0.1}" --main_process_port "$at" \
        --same_network --rdzv_backend static --deepspeed_multinode_launcher standard -m phi3_dist "$verb" "$@"
}
check_run "$@"
[ "$restarts" = 0 ] || supervise "$restarts" this_node "$@"
this_node 0 "$@"
