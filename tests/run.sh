#!/usr/bin/env bash
# Make or reuse .venv and run the tests; arguments go to pytest: tests/run.sh -m "not e2e"
set -euo pipefail
cd "$(dirname "$0")/.."
patches/make_venv.sh
exec .venv/bin/python -m pytest "$@"
