#!/usr/bin/env bash
# Sets up .venv if need be and runs the tests, two at a time. Arguments go to pytest: bash scripts/test.sh -k optim
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
exec python -m pytest --numprocesses 2 "$@"
