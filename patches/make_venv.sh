#!/usr/bin/env bash
# Make or reuse .venv: torch and vLLM for the CPU, OpenRLHF with patches/openrlhf-0.11.2 applied, and this plugin.
#
#   patches/make_venv.sh        (PYTHON=/path/to/python3.11 where python3.11 is not on PATH)
#
# The stack is installed again if its lock file, patch or build script changed, the plugin if its sources changed.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3.11}
release=patches/openrlhf-0.11.2
torch="torch==2.13.0+cpu"
bitsandbytes="bitsandbytes==0.50.2"

fingerprint() { cat "$@" | sha256sum | cut -c1-16; }
install() { .venv/bin/python -m pip --disable-pip-version-check install --quiet --no-compile "$@"; }
need() { echo "patches/make_venv.sh: needs $1" >&2 && exit 1; }

stack=".venv/.stack-$(fingerprint patches/make_venv.sh patches/build_wheel.py "$release"/*)"
if [ ! -e "$stack" ]; then
    command -v "$python" >/dev/null || need "Python 3.11: '$python' is not on PATH, set PYTHON=/path/to/it"
    command -v git >/dev/null || need "git"
    # DeepSpeed compiles CPU operators on first use.
    command -v g++ >/dev/null || need "a C++ compiler (g++)"
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -e "$headers/Python.h" ] || need "Python's headers (python3.11-dev): no Python.h in $headers"

    echo "== making .venv (about four minutes; 5 GB of disk)"
    .venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
    echo "-- $torch"
    # PyPI has the CUDA build only, so the CPU build is from PyTorch's index, unless pip is configured to find it.
    install "$torch" 2>/dev/null || install --index-url https://download.pytorch.org/whl/cpu "$torch"
    echo "-- Ray, DeepSpeed, vLLM and their requirements"
    install --no-deps --requirement "$release/requirements-cpu.txt"
    echo "-- OpenRLHF 0.11.2+cpu"
    # The contract tests keep the wheels of all supported releases in the same folder.
    rm -rf .venv/hosts
    .venv/bin/python patches/build_wheel.py .venv/hosts
    install --no-deps --force-reinstall .venv/hosts/openrlhf-0.11.2+cpu-*.whl
    # Apart: where it is installed, transformers and PEFT import it, and it warns of a kernel that it does not find.
    install --no-deps --upgrade --target .venv/bitsandbytes "$bitsandbytes"
    # On all cores, where pip would use one. Templates and examples of some packages are no valid Python.
    .venv/bin/python -m compileall -qq -j 0 .venv/lib || true
    rm -f .venv/.stack-* .venv/.plugin-*
    touch "$stack"
fi

readarray -d '' sources < <(find pama_plugin pyproject.toml README.md LICENSE -type f -not -name '*.pyc' -print0 | sort -z)
plugin=".venv/.plugin-$(fingerprint "${sources[@]}")"
if [ ! -e "$plugin" ]; then
    install --no-deps --no-build-isolation --force-reinstall .
    rm -f .venv/.plugin-*
    touch "$plugin"
fi
