#!/usr/bin/env bash
# Installs the project into .venv (once), then trains the quickstart agent on this machine's CPU or accelerator.
# The last line on stdout is the run's folder.
#
#   scripts/quickstart.sh
#   QUICKSTART_ARGS="algorithm.modulation=aem seed=1" scripts/quickstart.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

ensure_venv
cd "$root"
read -r -a overrides <<<"${QUICKSTART_ARGS:-}"
exec "$venv/bin/empg-jax" train quickstart ${overrides[@]+"${overrides[@]}"} "$@"
