#!/usr/bin/env bash
# Checks a machine with a GPU within 8 minutes and writes OUT/summary.json, step by step (see check_device.py).
# Needs JAX, flax, optax, orbax and transformers, as accelerator images have them, and jaxtyping and jinja2: it names
# what is missing and stops. No pydantic, no typer; without matplotlib runs have no curves.png.
#
#   scripts/check_gpu.sh OUT [--tiny] [--seconds S] [--only STEP ...]
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/check_device.py" "${@:-gpu-check}"
