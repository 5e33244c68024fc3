#!/usr/bin/env bash
# Starts drover on this host, on those of a hostfile, or inside a Slurm allocation, with the settings it
# wants. Ranks take their GPU, cores and NIC themselves (src/machine/placement.h): nothing here narrows
# what they are given, neither cores nor CUDA_VISIBLE_DEVICES.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: launch/run.sh [-np N] [--hostfile FILE] [--launcher auto|srun|mpirun] [--program FILE]
                     [--print-placement] [--dry-run] -- run --model … (drover's options)
  -np N            ranks; default: --tp × --pp × --dp of drover's options
  --hostfile FILE  Open MPI's hostfile; drover must be at the same path on every host
  --launcher WHICH auto: in a Slurm job srun, where it has a PMIx plug-in; else mpirun
  --print-placement  print each rank's host, GPU, cores, NUMA node and NIC, and end
  --program FILE   default: the drover of this tree (DROVER_BIN, build/release/drover, ../../bin/drover)
  --dry-run        print the command and the settings, start nothing
Ends with drover's exit code: 0 good, 2 usage, 3 bad input, 4 environment, 5 invalid result,
6 lost peer (also where mpirun itself reports the signal that ended a rank).
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/mpi_env.sh
source "$here/mpi_env.sh"
complain() { echo "run.sh: $2" >&2; exit "$1"; }

ranks="" hostfile="" program=${DROVER_BIN:-} dry=0 launcher=auto placement=0
while [[ $# -gt 0 ]]; do
  case $1 in
    -np | -n) ranks=${2:-}; shift 2 || complain 2 "$1 wants a number" ;;
    --hostfile) hostfile=${2:-}; shift 2 || complain 2 "$1 wants a file" ;;
    --program) program=${2:-}; shift 2 || complain 2 "$1 wants a file" ;;
    --launcher) launcher=${2:-}; shift 2 || complain 2 "$1 wants auto, srun or mpirun" ;;
    --print-placement) placement=1; shift ;;
    --dry-run) dry=1; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) usage >&2; complain 2 "unknown argument $1 (drover's own come after --)" ;;
  esac
done

# The grid says how many ranks, when nobody else does.
ranks_of_grid() {
  local product=1 previous="" argument value
  for argument in "$@"; do
    value=""
    case $previous in --tp | --pp | --dp) value=$argument ;; esac
    case $argument in --tp=* | --pp=* | --dp=*) value=${argument#*=} ;; esac
    if [[ $value =~ ^[0-9]+$ ]]; then product=$((product * value)); fi
    previous=$argument
  done
  echo "$product"
}

if [[ -z $ranks ]]; then ranks=$(ranks_of_grid "$@"); fi
[[ $ranks =~ ^[1-9][0-9]*$ ]] || complain 2 "-np wants a number of ranks, not '$ranks'"
if [[ $placement -eq 1 ]]; then
  if [[ $# -eq 0 ]]; then set -- run; fi
  [[ $1 == run ]] || complain 2 "--print-placement is of drover run, not of drover $1"
  set -- "$@" --print-placement
fi
if [[ -n $hostfile && ! -r $hostfile ]]; then complain 3 "cannot read the hostfile $hostfile"; fi
if [[ -z $program ]]; then
  for program in "$here/../build/release/drover" "$here/../../../bin/drover"; do
    [[ -x $program ]] && break
  done
  [[ -x $program ]] && program=$(realpath "$program")
fi
[[ -x $program ]] || complain 4 "no drover at $program: build it (cmake --preset release && ninja -C build/release) or name one with --program"

# srun starts ranks itself where its PMIx plug-in is there; Open MPI then finds its peers.
pmix_of_srun() { command -v srun >/dev/null && timeout 20 srun --mpi=list 2>&1 | grep -q pmix; }
case $launcher in
  auto)
    launcher=mpirun
    if [[ -n ${SLURM_JOB_ID:-} && -z $hostfile ]] && pmix_of_srun; then launcher=srun; fi ;;
  srun)
    [[ -z $hostfile ]] || complain 2 "--hostfile is mpirun's: srun takes the hosts of the allocation"
    [[ -n ${SLURM_JOB_ID:-} ]] || complain 4 "--launcher srun wants a Slurm allocation (SLURM_JOB_ID is not set): salloc, sbatch, or --launcher mpirun"
    pmix_of_srun || complain 4 "srun has no PMIx plug-in here (srun --mpi=list): ask for it, or use --launcher mpirun" ;;
  mpirun) ;;
  *) complain 2 "--launcher $launcher: expected auto, srun or mpirun" ;;
esac
if [[ $launcher == mpirun ]]; then
  command -v mpirun >/dev/null || complain 4 "mpirun is not in PATH: run launch/setup.sh, or load the Open MPI module"
fi

# A bundle brings spare copies of libraries that nearly every machine has (bundle.sh).
spare=$(dirname "$(realpath "$program")")/../lib/spare
if [[ -d $spare && $(ldd "$program" 2>/dev/null) == *'not found'* ]]; then
  LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$(realpath "$spare")
  export LD_LIBRARY_PATH
fi

drover_mpi_env "$ranks" "$hostfile"
if [[ $launcher == srun ]]; then
  # The ranks of a host are to have all its cores and GPUs of the job, which they share out.
  command=(srun --mpi=pmix -n "$ranks" --kill-on-bad-exit=1 --cpu-bind=none)
  if [[ -n ${SLURM_JOB_GPUS:-}${SLURM_GPUS_ON_NODE:-} ]]; then command+=(--gpu-bind=none); fi
  if ((ranks > ${SLURM_NTASKS:-$ranks})); then command+=(--overcommit); fi
else
  command=(mpirun -np "$ranks" "${DROVER_MPIRUN_FLAGS[@]}")
fi
if [[ -n $hostfile ]]; then
  # Other hosts do not inherit the environment (Open MPI's own settings, OMPI_MCA_*, go by themselves).
  # Which GPUs are visible is each host's own business.
  while read -r name; do command+=(-x "$name"); done < <(compgen -e | grep -E '^(OMP|NCCL|UCX|DROVER|ONEDNN)_' | sort)
  if [[ -d $spare && -n ${LD_LIBRARY_PATH:-} ]]; then command+=(-x LD_LIBRARY_PATH); fi
fi
command+=("$program" "$@")
{
  echo "run.sh: $(printf '%q ' "${command[@]}")"
  echo "run.sh: with $(env | grep -E '^(OMPI_|PRTE_|OMP_NUM_THREADS)' | sort | tr '\n' ' ')"
} >&2
if [[ $dry -eq 1 ]]; then exit 0; fi

asked_to_stop=0 warned=0
trap 'asked_to_stop=1' INT TERM
# The launcher passes it on to the ranks: they end at a safe point, a second one ends them at once.
trap 'warned=1' USR1
"${command[@]}" &
child=$!
# mpirun passes signals on to the ranks; wait again after each.
while true; do
  wait "$child"
  code=$?
  kill -0 "$child" 2>/dev/null || break
  if [[ $asked_to_stop -eq 1 ]]; then
    asked_to_stop=2
    if [[ $launcher == srun ]]; then
      # srun does not pass TERM on, it kills. Of two USR1 the first ends a run at a safe point, the second at once.
      kill -USR1 "$child" 2>/dev/null
      (sleep 3 && kill -USR1 "$child") >/dev/null 2>&1 &
    else
      kill -TERM "$child" 2>/dev/null
    fi
  fi
  if [[ $warned -eq 1 ]]; then warned=0; kill -USR1 "$child" 2>/dev/null; fi
done
# A signal may have come in the moment of the end: bash still knows how it was.
wait "$child" 2>/dev/null
last=$?
if ((last != 127)); then code=$last; fi
# mpirun tells the signal of the rank that died; for drover's users that is a lost peer.
if ((code > 128 && asked_to_stop == 0)); then code=6; fi
exit "$code"
