# Sourced by the other scripts: a virtual environment with this project in it.
#
# EMPG_VENV names the environment's folder (default: .venv in the checkout), EMPG_PYTHON the interpreter that makes it
# (default: the first of list_pythons).
# EMPG_CONSTRAINTS is a file of versions (default: scripts/constraints.txt, what was tested; none: the newest that
# pyproject.toml allows). It bounds whatever is installed, the extras for accelerators (EMPG_EXTRAS) too.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${EMPG_VENV:-$root/.venv}

# Prints the interpreters that the project supports, the preferred one first; also those that pyenv keeps.
list_pythons() {
  local candidate
  for candidate in python3.12 python3.11 python3 python ~/.pyenv/versions/3.1[12].*/bin/python; do
    if "$candidate" -c '
import ensurepip, sys, venv
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; then
      command -v "$candidate"
    fi
  done
}

find_python() {
  local found
  found=$(list_pythons)
  [[ -z $found ]] || { echo "${found%%$'\n'*}" && return; }
  echo "error: found no Python 3.11 or 3.12 with venv and pip (on Debian and Ubuntu: apt install python3-venv)" >&2
  return 1
}

# Usage: ensure_venv [EXTRAS], for example: ensure_venv test,parity
# Installs only when pyproject.toml changed, the extras are new, or an earlier installation was cut off.
ensure_venv() {
  local extras=${1:-} python version stamp constraints=${EMPG_CONSTRAINTS:-$root/scripts/constraints.txt}
  [[ $constraints != none ]] || constraints=/dev/null
  version=$(cat "$root/pyproject.toml" "$constraints" | cksum | cut -d ' ' -f 1)
  stamp=$venv/installed-$version${extras:+-$extras}
  if [[ -e $stamp ]] && "$venv/bin/python" -c 'import empg_jax' 2>/dev/null; then
    return
  fi
  if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    python=${EMPG_PYTHON:-$(find_python)}
    "$python" -m venv --clear "$venv"
  fi
  echo "installing into $venv ($("$venv/bin/python" --version)${extras:+, extras: $extras})" >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" \
    --editable "$root${extras:+[$extras]}" >&2
  find "$venv" -maxdepth 1 -name 'installed-*' ! -name "installed-$version*" -delete
  touch "$stamp"
}
