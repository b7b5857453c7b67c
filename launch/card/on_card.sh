#!/usr/bin/env bash
# Check everything on the GPU of a machine without network, from a checkout and the wheels that carry.sh gathered.
#
#   launch/card/on_card.sh CARRY OUT [options of python -m phi3_dist.bench.card]
#
# Installs the wheels into a temporary folder, and nothing else. OUT gets checks.jsonl and the logs. PYTHON names
# another interpreter than python3.
set -euo pipefail
if [[ $# -lt 2 || $1 == --help ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 2
fi
python=${PYTHON:-python3}
carry=$1 out=$2
shift 2
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$carry"/*.whl
export PYTHONPATH="$site:$project" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
"$python" -m phi3_dist.bench.card --out "$out" "$@"
