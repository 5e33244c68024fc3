#!/usr/bin/env bash
# launch_test.sh BUILD: run.sh's exit codes and settings, with small programs in drover's place; what
# is under test is the launcher, so any program that ends in the wanted way will do.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0
expect() {  # what want got
  if [[ $2 != "$3" ]]; then
    echo "$1: expected '$2', got '$3'"
    failures=$((failures + 1))
  fi
}
program() {  # name body
  printf '#!/bin/sh\n%s\n' "$2" >"$work/$1"
  chmod +x "$work/$1"
}
run() { "$root/launch/run.sh" "$@" >"$work/out" 2>"$work/err"; }

# A failed run sleeps through the grace; the shortest will do here.
export OMPI_MCA_odls_base_sigkill_timeout=1
program good 'exit 0'
run -np 2 --program "$work/good" --; expect "good run" 0 $?
# Every class of drover's own passes through.
for code in 2 3 5; do
  program "ends_$code" "exit $code"
  run -np 2 --program "$work/ends_$code" --; expect "class $code" "$code" $?
done
# shellcheck disable=SC2016  # for the program's own shell
program killed '[ "$OMPI_COMM_WORLD_RANK" = 1 ] && kill -9 $$; sleep 3; exit 6'
run -np 2 --program "$work/killed" --; expect "a rank killed by a signal is a lost peer" 6 $?

run --program "$work/good" --dry-run -- run --tp 3 --pp=2; expect "dry run" 0 $?
expect "ranks from the grid" 1 "$(grep -c 'mpirun -np 6 ' "$work/err")"
run --nonsense; expect "unknown argument" 2 $?
run -np many --program "$work/good" --; expect "ranks that are no number" 2 $?
run -np 1 --hostfile "$work/none" --program "$work/good" --; expect "missing hostfile" 3 $?
run -np 1 --program "$work/none" --; expect "missing program" 4 $?
printf '# two hosts\na slots=4\nb slots = 3\nc\n' >"$work/hosts"
# shellcheck source=launch/mpi_env.sh
. "$root/launch/mpi_env.sh"
expect "slots of a hostfile" 8 "$(drover_hostfile_slots "$work/hosts")"
# More ranks than cores: yield and do not bind; fewer: leave waiting as it is.
many=$(($(drover_cores) + 1))
clean=(env -u OMPI_MCA_mpi_yield_when_idle -u OMP_NUM_THREADS -u SLURM_JOB_ID -u PBS_JOBID -u LSB_JOBID)
"${clean[@]}" "$root/launch/run.sh" -np "$many" --program "$work/good" --dry-run 2>"$work/err"
expect "oversubscribed ranks yield" 1 "$(grep -c 'mpi_yield_when_idle=1' "$work/err")"
expect "oversubscribed ranks have one thread" 1 "$(grep -c 'OMP_NUM_THREADS=1 ' "$work/err")"
"${clean[@]}" "$root/launch/run.sh" -np 1 --program "$work/good" --dry-run 2>"$work/err"
expect "a lone rank does not yield" 0 "$(grep -c 'mpi_yield_when_idle' "$work/err")"
expect "a lone rank has all cores" 1 "$(grep -c "OMP_NUM_THREADS=$(drover_cores) " "$work/err")"
exit $((failures > 0))
