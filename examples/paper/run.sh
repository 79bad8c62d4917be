#!/usr/bin/env bash
# Train the runs of a sweep file of the replication and write a report. Resumes if started again.
#
#   examples/paper/run.sh FILE.yaml [JOBS]        (default: 1 run at a time)
#
# Needs no GPU. The first run installs the stack and makes the data, the policy and the reward models.
set -euo pipefail
cd "$(dirname "$0")/../.."

sweep=$1
out="examples/paper/results/$(basename "$sweep" .yaml)"
work="$PWD/runs/quickstart"
examples/paper/tiny.sh
. examples/quickstart/stack.sh
# Not in .venv, because the tests check the list of rules there.
packages="$PWD/runs/paper/packages-$(cat examples/paper/requirements.txt examples/paper/uniform_scalar/*.* | sha256sum | cut -c1-12)"
if [ ! -e "$packages" ]; then
    python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation --target "$packages" \
        --requirement examples/paper/requirements.txt examples/paper/uniform_scalar
fi
export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
if [ ! -e runs/paper/quality.json ]; then
    echo "== two reward models and their tokenizer (about five minutes)"
    OMP_NUM_THREADS=$cores python examples/paper/prepare.py "$work/data" runs/paper
fi
start_ray
mkdir -p "$out"
cp runs/paper/quality.json "$out"
pama sweep "$sweep" --out "$out" --jobs "${2:-1}"
pama report "$out"
