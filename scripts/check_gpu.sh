#!/usr/bin/env bash
# Checks a machine with a GPU within 8 minutes and writes OUT/summary.json, step by step (see check_device.py).
# Takes an accelerator image as it is: JAX, flax, optax, orbax, transformers; no pydantic, no typer.
#
#   scripts/check_gpu.sh OUT [--tiny] [--seconds S] [--only STEP ...]
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/check_device.py" "${@:-gpu-check}"
