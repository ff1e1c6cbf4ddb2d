#!/usr/bin/env bash
# Starts a run on all workers of a TPU pod slice: one command, which gcloud runs on each. The clone is installed on
# every worker (scripts/venv.sh and `pip install "jax[tpu]"`), and RUN_DIR is on a file system that all of them mount.
#
#   scripts/launch/tpu_pod.sh [--print] TPU ZONE RUN_DIR CONFIG [key=value ...]
#
# See also common.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"
need 4 $#

tpu=$1 zone=$2
shift 2
dir=${EMPG_DIR:-$(dirname "$(dirname "$here")")}
# The workers' places are known to the machine's metadata server only, so JAX is told to search.
remote=$(host_command "$dir/scripts/launch/host.sh" "$@" hosts.enabled=true)
launch gcloud compute tpus tpu-vm ssh "$tpu" "--zone=$zone" --worker=all "--command=$remote"
