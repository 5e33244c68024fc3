#!/usr/bin/env bash
# mpirun.sh RANKS PROGRAM [ARGUMENTS]: on this host, as root or not, with more ranks than cores or not.
set -euo pipefail
ranks=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=/dev/null
. "$here/../../launch/mpi_env.sh"
drover_mpi_env "$ranks"
exec mpirun -np "$ranks" "${DROVER_MPIRUN_FLAGS[@]}" "$@"
