#!/usr/bin/env bash
# Writes the API reference of jel, from its docstrings, to build/api/index.html.   bash scripts/docs.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
python -c 'import pdoc' 2>/dev/null || python -m pip install --quiet --disable-pip-version-check pdoc
modules="$(python -c 'import jel, pkgutil; print(*(m.name for m in pkgutil.walk_packages(jel.__path__, "jel.")))')"
# shellcheck disable=SC2086  # a word each
exec python -m pdoc --output-directory "${1:-build/api}" jel $modules '!jel.__main__'
