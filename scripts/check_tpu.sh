#!/usr/bin/env bash
# Checks a machine with TPUs within 8 minutes and writes OUT/summary.json, step by step (see check_device.py).
# Takes an image with jax[tpu], flax, optax, orbax and transformers as it is; no pydantic, no typer. Its steps
# fit a chip of 16 GB. It has never run on a TPU.
#
#   scripts/check_tpu.sh OUT [--tiny] [--seconds S] [--only STEP ...]
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/check_device.py" --device tpu "${@:-tpu-check}"
