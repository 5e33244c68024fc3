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

# In a Slurm job: srun where it has PMIx, mpirun otherwise. What is chosen is under test, so a program of
# ours stands in PATH for srun.
mkdir "$work/with_pmix" "$work/without"
for kind in with_pmix without; do
  program "$kind/srun" "[ \"\$1\" = --mpi=list ] && { echo 'none cray_shasta $([[ $kind == with_pmix ]] && echo pmix pmix_v4)'; exit; }; exit 3"
done
slurm() { # folder arguments: its dry run in a job
  PATH=$work/$1:$PATH SLURM_JOB_ID=7 SLURM_NTASKS=4 SLURM_JOB_GPUS=0,1 \
    "$root/launch/run.sh" "${@:2}" --program "$work/good" --dry-run 2>"$work/err"
}
slurm with_pmix -np 4; expect "in a Slurm job" 0 $?
expect "srun with PMIx" 1 "$(grep -c 'srun --mpi=pmix -n 4 --kill-on-bad-exit=1 --cpu-bind=none --gpu-bind=none ' "$work/err")"
slurm with_pmix -np 5; expect "more ranks than tasks" 1 "$(grep -c -- '-n 5 .*--overcommit ' "$work/err")"
slurm with_pmix -np 4 --launcher mpirun; expect "the flag chooses" 1 "$(grep -c 'mpirun -np 4 ' "$work/err")"
slurm without -np 4; expect "srun without PMIx" 1 "$(grep -c 'mpirun -np 4 ' "$work/err")"
slurm without -np 4 --launcher srun; expect "srun without PMIx, asked for" 4 $?
slurm with_pmix -np 4 --launcher srun --hostfile "$work/hosts"; expect "srun has no hostfile" 2 $?
env -u SLURM_JOB_ID "$root/launch/run.sh" -np 1 --launcher srun --program "$work/good" --dry-run 2>"$work/err"
expect "srun outside of a job" 4 $?
PATH=$work/with_pmix:$PATH SLURM_JOB_ID=7 SLURM_NTASKS=4 "$root/launch/run.sh" -np 1 --program "$work/good" 2>"$work/err"
expect "srun's exit code is the run's" 3 $?
run -np 1 --launcher bsub --program "$work/good" --; expect "unknown launcher" 2 $?
# Nothing is narrowed: neither GPUs nor cores.
# shellcheck disable=SC2016
program tells 'echo "${CUDA_VISIBLE_DEVICES-unset} $(sed -n "s/^Cpus_allowed_list:[[:space:]]*//p" /proc/self/status)"'
all=$(sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status)
expect "what a rank sees" "unset $all" "$(env -u CUDA_VISIBLE_DEVICES "$root/launch/run.sh" -np 2 --program "$work/tells" -- 2>/dev/null | sort -u)"
expect "what a rank is given" "GPU-a,GPU-b $all" "$(CUDA_VISIBLE_DEVICES=GPU-a,GPU-b "$root/launch/run.sh" -np 2 --program "$work/tells" -- 2>/dev/null | sort -u)"
run --print-placement --program "$work/good" --dry-run -- generate; expect "placement is run's" 2 $?
run --print-placement --program "$work/good" --dry-run; expect "placement" 1 "$(grep -c 'good run --print-placement' "$work/err")"
exit $((failures > 0))
