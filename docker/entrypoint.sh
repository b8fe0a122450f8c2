#!/usr/bin/env bash
# entrypoint.sh ACCELERATE_CONFIG RECIPE [KEY=VALUE]...   trains (again: resumes)
# entrypoint.sh privtrain|attacks|accountants|bash ...    runs that command
# Several machines: NUM_MACHINES, MACHINE_RANK, MAIN_ADDRESS and MAIN_PORT, and NUM_PROCESSES over all of them.
set -euo pipefail
case "${1:---help}" in
  *.yaml) ;;
  --help) exec privtrain --help ;;
  *) exec "$@" ;;
esac
config=$1
shift
flags=()
[ -z "${NUM_PROCESSES:-}" ] || flags+=(--num_processes "$NUM_PROCESSES")
if [ "${NUM_MACHINES:-1}" -gt 1 ]; then
  flags+=(--num_machines "$NUM_MACHINES" --machine_rank "$MACHINE_RANK"
    --main_process_ip "$MAIN_ADDRESS" --main_process_port "${MAIN_PORT:-29500}")
fi
exec accelerate launch --config_file "$config" "${flags[@]}" -m privtrain train "$@"
