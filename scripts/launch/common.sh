# What the launchers share (bash 4.4 or later). Sourced by each of them with its own arguments.
#
#   EMPG_DIR      the clone on the hosts, in the same place on all (default: where this one is here)
#   EMPG_COMMAND  the program, relative to the clone (default: .venv/bin/empg-jax)

print=
if [[ ${1:-} == --print ]]; then
  print=yes
  shift
fi

# Ends with the comment at the head of the launcher, unless there are enough arguments.
need() {
  if (($1 > $2)); then
    sed -nE '2,/^($|set)/s/^# ?//p' "$0" >&2
    exit 2
  fi
}

# Quotes arguments for a shell, where they need it.
quote() {
  local argument line=()
  for argument in "$@"; do
    [[ $argument =~ ^[a-zA-Z0-9_./:=,@%+-]+$ ]] || argument=${argument@Q}
    line+=("$argument")
  done
  echo "${line[*]}"
}

# Runs a command, or prints it with --print, as it could be pasted into a shell.
launch() {
  if [[ -n $print ]]; then
    quote "$@"
  else
    "$@"
  fi
}

# The command line of one host, quoted for the shell that will read it there.
host_command() {
  local settings=()
  [[ -z ${EMPG_COMMAND:-} ]] || settings+=("EMPG_COMMAND=$EMPG_COMMAND")
  quote env "${settings[@]}" "$@"
}
