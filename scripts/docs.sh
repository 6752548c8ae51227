#!/usr/bin/env bash
# Writes the API reference of jel, from its docstrings, to build/api/index.html.   bash scripts/docs.sh [FOLDER]
# The modules of jel.integrations whose framework is not installed are left out, with a line each.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
python -c 'import pdoc' 2>/dev/null || python -m pip install --quiet --disable-pip-version-check pdoc
specs="$(python - <<'EOF'
import importlib, pkgutil, sys
import jel.integrations

for module in pkgutil.iter_modules(jel.__path__, "jel."):  # one by one: jel itself names its public names only
    if module.name.removeprefix("jel.") not in ("__main__", *jel.__all__):
        print(module.name)
for module in pkgutil.iter_modules(jel.integrations.__path__, "jel.integrations."):
    try:
        importlib.import_module(module.name)
    except ImportError as e:
        print(f"left out: {module.name}, which needs {e.name}", file=sys.stderr)
        print(f"!{module.name}")
EOF
)"
# shellcheck disable=SC2086  # a word each
exec python -m pdoc --output-directory "${1:-build/api}" jel $specs
