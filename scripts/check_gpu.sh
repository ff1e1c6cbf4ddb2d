#!/usr/bin/env bash
# Checks an accelerator image (JAX, flax, optax, orbax, transformers; no pydantic, no typer): parity (among
# other things of the fused attention), the benchmarks, and the quickstart. Writes JSON and the run into the
# folder given (default: gpu-check).
#
#   scripts/check_gpu.sh OUT
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-gpu-check}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=$root:$root/envs${PYTHONPATH:+:$PYTHONPATH}

"$python" "$root/scripts/check_parity.py" | tee "$out/parity.json"
"$python" "$root/scripts/bench_limit.py" --out "$out/limit.json"
"$python" "$root/scripts/bench_attention.py" --out "$out/attention.json"
"$python" "$root/scripts/bench_learner.py" --out "$out/learner.json"
"$python" "$root/scripts/bench_engine.py" --out "$out/engine.json"
"$python" "$root/scripts/train_resolved.py" "$root/scripts/quickstart.resolved.yaml" "run_dir=$out/quickstart" \
  log.tensorboard=false
cat "$out/quickstart/summary.json"
