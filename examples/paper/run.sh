#!/usr/bin/env bash
# Make the study again from nothing: install the stack, make policies and reward models, train all runs of stages A and
# B, and write the results. Can be interrupted and started again; a finished run is never repeated. Needs no GPU.
#
#   examples/paper/run.sh [STAGE...]        (default: A B)
#
# About 20 minutes of preparation and 18 hours of training on two cores; every stage shows how much is left. Stage C,
# which needs a GPU, is examples/paper/without_host.py.
set -euo pipefail
cd "$(dirname "$0")/../.."

stages=("$@")
[ $# -gt 0 ] || stages=(A B)
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
make_smollm2
start_ray
failed=0
for stage in "${stages[@]}"; do
    python examples/paper/study.py "$stage" || failed=1
done
python examples/paper/study.py collect
exit $failed
