#!/usr/bin/env bash
# A short try with the other Python that the project supports, where this machine has one: the locked packages in an
# environment of their own, every module imported, and a few tests from reading a configuration to a tiny run.
#
#   scripts/other_python.sh FOLDER    # takes the environment; the Python of .venv (EMPG_VENV) is not the other one
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

used=$(version_of "$venv/bin/python")
for python in $(list_pythons); do
  [[ $(version_of "$python") == "$used" ]] || break
  python=
done
if [[ -z ${python:-} ]]; then
  echo "only Python $used is here: the other one is not tried"
  exit
fi

# Bytecode is made of what is imported only.
export PIP_NO_COMPILE=1 PYTHONDONTWRITEBYTECODE=
venv=$1 EMPG_PYTHON=$python ensure_venv test
cd "$root"
"$1/bin/python" -W error - <<'END'
import importlib
import pkgutil

for package in ("empg_jax", "empg_envs"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.endswith("__main__") and ".repos." not in module.name:
            importlib.import_module(module.name)
END
"$1/bin/python" -m pytest -q -n 2 -p no:cacheprovider tests/test_lists.py tests/config/test_config.py \
  tests/envs/swe/test_swe_reading.py tests/envs/swe/test_swe_terse.py tests/test_trainer.py::test_a_run_leaves_its_files
