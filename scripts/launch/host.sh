#!/usr/bin/env bash
# What every launcher starts on every host: a new run or, where its folder is there, the same run gone on with. So a
# job that is started again after a failure or a pre-emption needs no other command.
#
#   scripts/launch/host.sh RUN_DIR CONFIG [key=value ...]
#
# With EMPG_HOLD=1 the run is asked to stop, with a checkpoint, when the standard input ends.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

run=$1 config=$2
shift 2
read -ra command <<<"${EMPG_COMMAND:-.venv/bin/empg-jax}"
if [[ -e $run/config.yaml ]]; then
  # The folder holds the configuration. What a resumed run may change is passed on, the rest named.
  command+=(train --resume "$run") left=()
  for override in "$@"; do
    case ${override%%=*} in
    train.updates | train.profile | compile_cache | log | log.* | hosts | hosts.* | mesh | mesh.* | serve | serve.* | \
      train.micro_tokens | train.share_prefix | \
      rollout.data | rollout.tensor | rollout.devices | rollout.release | \
      rollout.url | rollout.weights_dir | rollout.request_timeout | checkpoint.dir) command+=("$override") ;;
    *) left+=("$override") ;;
    esac
  done
  [[ ${#left[@]} == 0 ]] || echo "$run goes on as it began; without effect: ${left[*]}" >&2
else
  command+=(train "$config" "run_dir=$run" "$@")
fi

[[ -n ${EMPG_HOLD:-} ]] || exec "${command[@]}"
exec 3<&0
"${command[@]}" </dev/null 3<&- &
pid=$!
# Nothing may hold the output when the run has ended, or ssh would wait for it.
{ while read -r _; do :; done <&3; kill -TERM "$pid"; } >/dev/null 2>&1 &
watch=$!
status=0
wait "$pid" || status=$?
kill "$watch" 2>/dev/null || true
exit "$status"
