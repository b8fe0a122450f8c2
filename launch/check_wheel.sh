#!/usr/bin/env bash
# usage: launch/check_wheel.sh WHEEL VERSION: install a wheel into a clean environment elsewhere, and run its programs.
set -euo pipefail
wheel=$(realpath "$1") version=$2 constraints=$(realpath constraints.txt)
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT
"${PYTHON:-python3}" -m venv "$away/venv"
cd "$away" # nothing may be imported from the checkout
# shellcheck disable=SC2086 # PIP_FLAGS are several words
venv/bin/python -m pip install -q ${PIP_FLAGS:-} -c "$constraints" "$wheel"
test "$(venv/bin/privtrain --version)" = "$version"
for program in privtrain attacks accountants; do venv/bin/$program --help >/dev/null; done
venv/bin/privtrain schema >/dev/null
venv/bin/accountants epsilon -s 1 -q 0.01 -t 100 -d 1e-5
venv/bin/python -c 'import attacks.analysis.registry as r; print(len(r.ATTACKS), "attacks")'
echo "$(basename "$wheel") works from $away"
