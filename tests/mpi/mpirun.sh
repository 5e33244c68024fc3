#!/usr/bin/env bash
# mpirun.sh RANKS PROGRAM [ARGUMENTS]: on this host, as root or not, with more ranks than cores or not.
set -euo pipefail
ranks=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=/dev/null
. "$here/../../launch/mpi_env.sh"
drover_mpi_env "$ranks"
# Open MPI unloads its modules before leaks are counted: what they kept cannot be told by name.
export ASAN_OPTIONS="${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0"
exec mpirun -np "$ranks" "${DROVER_MPIRUN_FLAGS[@]}" "$@"
