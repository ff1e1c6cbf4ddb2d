#!/usr/bin/env bash
# Starts a run on a list of hosts, one process on each, over ssh (keys, no passwords). RUN_DIR is on a file system that
# all of them share. The launcher ends with the run; Ctrl-C, SIGTERM or its end stop the run, with a checkpoint.
#
#   scripts/launch/ssh.sh [--print] HOST,HOST,... RUN_DIR CONFIG [key=value ...]
#
# EMPG_PORT is the port on the first host (default 8476); the next one is used, too. See also common.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"
need 3 $#

IFS=, read -ra hosts <<<"$1"
shift
dir=${EMPG_DIR:-$(dirname "$(dirname "$here")")}
# The hosts' standard input ends when this process closes it or dies.
pipe=$(mktemp -u)
mkfifo "$pipe"
exec 9<>"$pipe" 8<"$pipe"
rm "$pipe"

pids=()
for index in "${!hosts[@]}"; do
  seat=("hosts.coordinator=${hosts[0]##*@}:${EMPG_PORT:-8476}" "hosts.num=${#hosts[@]}" "hosts.index=$index")
  remote=$(host_command EMPG_HOLD=1 "$dir/scripts/launch/host.sh" "$@" "${seat[@]}")
  command=(ssh -o BatchMode=yes "${hosts[index]}" "$remote")
  if [[ -n $print ]]; then
    launch "${command[@]}"
  else
    "${command[@]}" <&8 8<&- 9>&- > >(sed -u "s/^/${hosts[index]//\//\\/}: /" 8<&- 9>&-) 2>&1 &
    pids+=($!)
  fi
done

trap 'exec 9>&-' INT TERM
status=0
for pid in "${pids[@]}"; do
  while
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2>/dev/null # a signal has ended the wait, not the process
  do :; done
  if ((status == 0)); then status=$code; fi
done
exit "$status"
