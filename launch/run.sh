#!/usr/bin/env bash
# Starts drover under mpirun, on this host or on those of a hostfile, with the settings it wants.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: launch/run.sh [-np N] [--hostfile FILE] [--program FILE] [--dry-run] -- run --model … (drover's options)
  -np N            ranks; default: --tp × --pp × --dp of drover's options
  --hostfile FILE  Open MPI's hostfile; drover must be at the same path on every host
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

ranks="" hostfile="" program=${DROVER_BIN:-} dry=0
while [[ $# -gt 0 ]]; do
  case $1 in
    -np | -n) ranks=${2:-}; shift 2 || complain 2 "$1 wants a number" ;;
    --hostfile) hostfile=${2:-}; shift 2 || complain 2 "$1 wants a file" ;;
    --program) program=${2:-}; shift 2 || complain 2 "$1 wants a file" ;;
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
if [[ -n $hostfile && ! -r $hostfile ]]; then complain 3 "cannot read the hostfile $hostfile"; fi
if [[ -z $program ]]; then
  for program in "$here/../build/release/drover" "$here/../../../bin/drover"; do
    [[ -x $program ]] && break
  done
  [[ -x $program ]] && program=$(realpath "$program")
fi
[[ -x $program ]] || complain 4 "no drover at $program: build it (cmake --preset release && ninja -C build/release) or name one with --program"
command -v mpirun >/dev/null || complain 4 "mpirun is not in PATH: run launch/setup.sh, or load the Open MPI module"

# A bundle brings spare copies of libraries that nearly every machine has (bundle.sh).
spare=$(dirname "$(realpath "$program")")/../lib/spare
if [[ -d $spare && $(ldd "$program" 2>/dev/null) == *'not found'* ]]; then
  LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$(realpath "$spare")
  export LD_LIBRARY_PATH
fi

drover_mpi_env "$ranks" "$hostfile"
command=(mpirun -np "$ranks" "${DROVER_MPIRUN_FLAGS[@]}")
if [[ -n $hostfile ]]; then
  # Other hosts do not inherit the environment.
  command+=(-x OMP_NUM_THREADS)
  if [[ -d $spare && -n ${LD_LIBRARY_PATH:-} ]]; then command+=(-x LD_LIBRARY_PATH); fi
fi
command+=("$program" "$@")
{
  echo "run.sh: $(printf '%q ' "${command[@]}")"
  echo "run.sh: with $(env | grep -E '^(OMPI_|OMP_NUM_THREADS)' | sort | tr '\n' ' ')"
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
  if [[ $asked_to_stop -eq 1 ]]; then kill -TERM "$child" 2>/dev/null; asked_to_stop=2; fi
  if [[ $warned -eq 1 ]]; then warned=0; kill -USR1 "$child" 2>/dev/null; fi
done
# A signal may have come in the moment of the end: bash still knows how it was.
wait "$child" 2>/dev/null
last=$?
if ((last != 127)); then code=$last; fi
# mpirun tells the signal of the rank that died; for drover's users that is a lost peer.
if ((code > 128 && asked_to_stop == 0)); then code=6; fi
exit "$code"
