#!/usr/bin/env bash
# Build the release, check it, install the wheel into an empty environment, and run its commands there.
#
#     PYTHON=python3.11 tests/release/run.sh       # leaves sdist and wheel in dist/
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1
step() { printf '%4d s  %s\n' "$SECONDS" "$1"; }

"${PYTHON:-python3}" -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet build==1.6.1 twine==7.0.0 cffconvert==2.0.0 packaging
rm -rf dist
"$work/tools/bin/python" -m build --outdir dist . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
"$work/tools/bin/twine" check --strict dist/*
"$work/tools/bin/cffconvert" --validate -i CITATION.cff
"$work/tools/bin/python" tests/release/contents.py dist
step "built and checked"

"${PYTHON:-python3}" -m venv "$work/env"
bin=$work/env/bin
"$bin/pip" install --quiet --constraint constraints.txt torch
step "torch installed: $(du -sm "$work/env" | cut -f1) MB"
wheel=$(ls dist/*.whl)
"$bin/pip" install --quiet --constraint constraints.txt "$wheel"
step "core installed: $(du -sm "$work/env" | cut -f1) MB"
cd "$work"
"$bin/python" "$root/tests/release/commands.py" core
step "the core's commands ran"
"$bin/pip" install --quiet --constraint "$root/constraints.txt" "$root/$wheel[report]"
"$bin/python" "$root/tests/release/commands.py" report
step "the report extra installed, and a report written"
"$bin/python" "$root/tests/release/container.py" "$root"
step "the container's steps ran"
