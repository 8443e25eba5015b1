#!/usr/bin/env bash
# Passes the tests, in an environment made by scripts/setup.sh.
# Usage: scripts/test.sh          the whole suite, slow tests included
#        scripts/test.sh fast     the daily part, without slow tests
#        further arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
select=()
if [ "${1:-}" = fast ]; then
  select=(-m "not slow")
  shift
fi
exec "${MOLE_VENV:-.venv}/bin/python" -m pytest -n 2 --dist loadgroup "${select[@]}" "$@"
