#!/usr/bin/env bash
# The main job on the embedded backbone, from nothing: five experts, a library, an X-LoRA mixture, a table, plots.
# Usage: scripts/quickstart.sh [overrides of `mole quickstart`]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh plot
exec "${MOLE_VENV:-.venv}/bin/mole" quickstart "$@"
