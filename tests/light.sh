#!/usr/bin/env bash
# The tests of aggregation, batch, settings and rewards, in an environment of their own: torch, pydantic, PyYAML,
# hypothesis and pytest, without OpenRLHF. Made in a minute, tested in two: for whoever writes a rule or a reward.
#
#   tests/light.sh [PYTEST ARGUMENTS]        (PYTHON=python3.12: another Python, from 3.10 on)
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=.venv-light-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ ! -e "$venv/.ready" ]; then
    "$python" -m venv --clear "$venv"
    install() { "$venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }
    # PyPI has the CUDA build alone, so the CPU build comes from PyTorch's own index unless pip finds it without.
    install "torch==2.13.0+cpu" 2>/dev/null || install --index-url https://download.pytorch.org/whl/cpu torch
    install "pydantic>=2.7" "PyYAML>=6.0" "hypothesis>=6.100" "pytest>=8" "pytest-timeout>=2.3"
    touch "$venv/.ready"
fi
exec "$venv/bin/python" -m pytest -m "not slow and not needs_extras" tests/property \
    tests/unit/test_{aggregate,alarms,batch,config,kinds,registry,rewards,shaping,state}.py \
    pama_plugin/{aggregation,batch,rewards,settings} \
    --ignore=pama_plugin/rewards/{hf,http,judge,server,urls}.py "$@"
