#!/usr/bin/env bash
# Creates .venv in the checkout and installs the project into it. Safe to run again: nothing is installed while
# pyproject.toml is older than the last installation. Source it (`source scripts/setup.sh`) to also activate .venv.
#   PYTHON=python3.12 bash scripts/setup.sh     choose the interpreter (3.10 or newer)
# Works with bash 3.2 (macOS).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"

command -v "$python" >/dev/null || { echo "error: $python not found; install Python 3.10 or newer, or set PYTHON" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
    || { echo "error: $("$python" --version) is too old; Python 3.10 or newer is needed" >&2; exit 2; }
"$python" -c 'import venv, ensurepip' 2>/dev/null \
    || { echo "error: $python has no venv module; install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }

[ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
stamp="$root/.venv/.installed"
if [ ! -f "$stamp" ] || [ "$root/pyproject.toml" -nt "$stamp" ]; then
    echo "setup: installing into $root/.venv (torch first, then the rest)"
    pip=("$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" torch==2.13.0      # the version that all reported numbers come from; pyproject.toml accepts torch>=2.9
    "${pip[@]}" -e "$root[nanochat,dev]"
    touch "$stamp"
fi
export PATH="$root/.venv/bin:$PATH" VIRTUAL_ENV="$root/.venv"
