#!/usr/bin/env bash
# Make or reuse .venv: torch and vLLM for the CPU, OpenRLHF with patches/openrlhf-0.11.2 applied, and this plugin.
#
#   patches/make_venv.sh        (PYTHON=/path/to/python3.11 where python3.11 is not on PATH)
#
# The stack is installed once per state of its lock file, patch and build script; the plugin every time, in seconds.
set -euo pipefail
cd "$(dirname "$0")/.."

release=patches/openrlhf-0.11.2
torch="torch==2.13.0+cpu"
stamp=".venv/.stack-$(cat "$0" "$release"/* patches/build_wheel.py | sha256sum | cut -c1-16)"

if [ ! -e "$stamp" ]; then
    echo "== making .venv (about two minutes; 3 GB of disk)"
    [ -x .venv/bin/python ] || "${PYTHON:-python3.11}" -m venv .venv
    pip="$PWD/.venv/bin/python -m pip --disable-pip-version-check install --quiet"
    echo "-- $torch"
    # PyPI has the CUDA build alone, so the CPU build comes from PyTorch's own index unless pip finds it without.
    $pip "$torch" 2>/dev/null || $pip --index-url https://download.pytorch.org/whl/cpu "$torch"
    echo "-- Ray, DeepSpeed, vLLM and what they need"
    $pip --no-deps --requirement "$release/requirements-cpu.txt"
    echo "-- OpenRLHF 0.11.2+cpu"
    wheels=$(mktemp -d)
    trap 'rm -rf "$wheels"' EXIT
    .venv/bin/python patches/build_wheel.py "$wheels"
    $pip --no-deps --force-reinstall "$wheels"/openrlhf-*.whl
    rm -f .venv/.stack-*
    touch "$stamp"
fi
.venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation --force-reinstall .
