#!/usr/bin/env bash
# usage: launch/single.sh RUN.yaml [key.path=value ...] [--overwrite]
#
# One process without a launcher, for debugging: the first GPU, or the CPU; breakpoint() works, tracebacks are plain.
# Every argument goes to `phi3-dist train`, or to `phi3-dist sweep` where the file has a section `sweep`. The exit code is the run's own.

set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

case ${1:-} in
    -h | --help) usage && exit 0 ;;
    "") fail "no run file" "launch/single.sh configs/run/debug.yaml" ;;
esac
exec python -m phi3_dist "$(verb_of "$1")" "$@"
