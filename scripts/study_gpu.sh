#!/usr/bin/env bash
# Trains SmolLM2-135M-Instruct on ALFWorld's generated games by plain GRPO, with EMPG and with AEM, three seeds each,
# within 9 minutes on one GPU, and writes OUT/summary.json (see study_gpu.py). Needs the folder that
# scripts/fetch_smollm2.sh makes, and the packages of check_gpu.sh; no pydantic, no typer.
#
#   scripts/study_gpu.sh OUT [--model FOLDER] [--tiny] [--seconds S] [--seeds N ...]
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/study_gpu.py" "${@:-study-gpu}"
