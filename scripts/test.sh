#!/usr/bin/env bash
# Installs the project with its test packages into .venv (once), then runs the tests; arguments go to pytest.
# What is marked slow (installations, a soak, compilations of 32B shapes) runs under CI=true or with -m slow only,
# what is marked long with -m long only.
#
#   scripts/test.sh
#   scripts/test.sh tests/algorithms -k empg
#   EMPG_EXTRAS=parity scripts/test.sh -m parity
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

ensure_venv "test${EMPG_EXTRAS:+,$EMPG_EXTRAS}"
cd "$root"
[[ ${CI:-} == true ]] && set -- -m "not long" "$@" || set -- -m "not slow" "$@"
exec "$venv/bin/python" -m pytest -n 3 --dist worksteal "$@"
