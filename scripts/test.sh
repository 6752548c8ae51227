#!/usr/bin/env bash
# Sets up .venv where needed, checks format, lint and types, and runs the tests in two processes.
# Arguments go to pytest:   bash scripts/test.sh -k optim      bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

echo "=== format: ruff format --check (to repair: ruff format .)"
python -m ruff format --check .
echo "=== lint: ruff check"
python -m ruff check .
echo "=== types: mypy on jel/"
python -m mypy
echo "=== tests: pytest"
exec python -m pytest --numprocesses 2 ${1+"$@"}   # plain "$@" without arguments is an error in some old shells
