#!/usr/bin/env bash
# Starts a run as a job of a Ray cluster: the trainer on one node, the environments' workers on all that offer what
# they take. The clone is installed on every node, with the extra ray.
#
#   scripts/launch/ray_job.sh [--print] http://HEAD:8265 RUN_DIR CONFIG [key=value ...]
#
# EMPG_RAY_OPTIONS are options of `ray job submit`, for example --entrypoint-num-gpus=8. See also common.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"
need 3 $#

address=$1
shift
dir=${EMPG_DIR:-$(dirname "$(dirname "$here")")}
read -ra options <<<"${EMPG_RAY_OPTIONS:-}"
remote=$(host_command "$dir/scripts/launch/host.sh" "$@" workers.backend=ray)
launch ray job submit "--address=$address" "${options[@]}" -- bash -c "$remote"
