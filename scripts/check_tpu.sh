#!/usr/bin/env bash
# Checks a machine with TPUs within 8 minutes and writes OUT/summary.json, step by step (see check_device.py).
# Needs jax[tpu], flax, optax, orbax, transformers, jaxtyping and jinja2: it names what is missing and stops. No pydantic,
# no typer; without matplotlib runs have no curves.png. Its steps fit a chip of 16 GB. It has never run on a TPU.
#
#   scripts/check_tpu.sh OUT [--tiny] [--seconds S] [--only STEP ...]
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/check_device.py" --device tpu "${@:-tpu-check}"
