#!/usr/bin/env bash
# Gather the wheels that a GPU machine without network needs beside what it has: torch, transformers, accelerate, triton.
#
#   launch/card/carry.sh DEST [PYTHON_VERSION]     PYTHON_VERSION: of that machine, 3.12 by default
#
# About 11 MiB. Versions come from constraints.txt; make setup comes first. On that machine, in a checkout:
#
#   launch/card/on_card.sh DEST OUT [options of python -m phi3_dist.bench.card]
set -euo pipefail
if [[ ${1:-} == "" || ${1:-} == --help ]]; then
  sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 2
fi
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python_version=${2:-3.12}
mkdir -p "$1"
dest=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -f "$dest"/*.whl

version() { # NAME: the tested version
  grep -iE "^${1//[-_]/[-_]}==" "$project/constraints.txt" | head -n1 | cut -d= -f3
}

get() { # FOLDER NAME [VERSION]: the wheel for that machine
  local platforms=()
  for n in 2_34 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${n}_x86_64"); done
  "$project/.venv/bin/python" -m pip download -q --no-deps --only-binary=:all: --python-version "$python_version" \
    --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 --platform any -d "$1" "$2${3:+==$3}"
}

for name in annotated-types hjson peft pydantic pydantic-core typing-extensions typing-inspection; do
  get "$dest" "$name" "$(version "$name")"
done
get "$dest" liger-kernel "$(version liger-kernel)"
# deepspeed is published as source; without its operators it is pure Python, but its build wants torch
DS_BUILD_OPS=0 "$project/.venv/bin/python" -m pip wheel -q --no-deps --no-build-isolation -w "$dest" \
  "deepspeed==$(version deepspeed)"
# bitsandbytes with the one library that CUDA 13 needs: the whole wheel is 43 MB
get "$work" bitsandbytes "$(version bitsandbytes)"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q wheel
mkdir -p "$work/out"
(
  cd "$work"
  "$work/venv/bin/python" -m wheel unpack -d bnb bitsandbytes-*.whl >/dev/null
  cd bnb/bitsandbytes-*
  find . -name 'libbitsandbytes_*.so' ! -name '*cuda130*' ! -name '*cpu*' -delete
  "$work/venv/bin/python" -m wheel pack -d "$work/out" . >/dev/null
)
cp "$work"/out/*.whl "$dest"
du -sh "$dest"
ls "$dest"
