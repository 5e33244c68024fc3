# Sourced by the batch scripts here: what a topology file asks of Slurm, and one run in attempts.
# `script` is the name of the script that sources this; `settings` its own options.
# shellcheck shell=bash disable=SC2154,SC2034,SC2004
set -uo pipefail

complain() { echo "$script: $2" >&2; exit "$1"; }

# The tree this file lies in (sbatch runs a copy of its script elsewhere), and the program to run.
find_root() {
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  program=${DROVER_BIN:-$root/build/release/drover}
  # An installed tree or a bundle.
  if [[ -z ${DROVER_BIN:-} && ! -x $program && -x $root/../../bin/drover ]]; then
    program=$(realpath "$root/../../bin/drover")
  fi
  [[ -x $program ]] || complain 4 "no drover at $program: batch scripts never build; build it on the login node (tests/run.sh or launch/demo.sh does), or name one with DROVER_BIN"
}

# The value of `section.key` in a topology file; empty: not there.
of_topology() {
  awk -v want="$1" '
    { sub(/[#;].*/, ""); gsub(/^[ \t]+|[ \t\r]+$/, "") }
    /^\[.*\]$/ { section = substr($0, 2, length($0) - 2); next }
    split($0, part, /[ \t]*=[ \t]*/) == 2 && section "." part[1] == want { print part[2]; exit }
  ' "$topology"
}

# An option of drover's: behind the run file on the command line, else in the run file, else `otherwise`.
option() {  # name otherwise
  local previous="" argument value=""
  for argument in "${extra[@]}"; do
    if [[ $previous == "--$1" ]]; then echo "$argument"; return; fi
    if [[ $argument == "--$1="* ]]; then echo "${argument#*=}"; return; fi
    previous=$argument
  done
  value=$(sed -nE "s/^[[:space:]]*$1[[:space:]]*=[[:space:]]*([^#]*[^#[:space:]]).*/\\1/p" "$run_file" | tail -n 1)
  echo "${value:-$2}"
}

# `extra` without an option that the script sets itself.
without() {  # name
  local kept=() skip=0 argument
  for argument in "${extra[@]}"; do
    if ((skip)); then skip=0; continue; fi
    case $argument in
      "--$1") skip=1 ;;
      "--$1="*) ;;
      *) kept+=("$argument") ;;
    esac
  done
  extra=("${kept[@]}")
}

# Leading options that the script knows go to `settings`, others to sbatch; then TOPOLOGY RUN [drover's].
parse() {  # known-names arguments…
  local known=" $1 " name
  shift
  sbatch_options=() extra=()
  while [[ ${1:-} == -* ]]; do
    name=${1#--} name=${name%%=*}
    case $1 in
      -h | --help) usage; exit 0 ;;
      --*)
        if [[ $known == *" $name "* ]]; then
          [[ $1 == *=?* ]] || complain 2 "--$name wants a value: --$name=…"
          settings[$name]=${1#*=}
        else
          sbatch_options+=("$1")
        fi ;;
      *) complain 2 "write options of sbatch as --name=value, not as $1" ;;
    esac
    shift
  done
  if [[ $# -lt 2 ]]; then
    usage >&2
    complain 2 "a topology file (topology/*.ini) and a run file (key = value, as drover's --config) are needed"
  fi
  topology=$1 run_file=$2
  shift 2
  extra=("$@")
  [[ -r $topology ]] || complain 3 "cannot read the topology file $topology: $root/topology has some, its README the format"
  [[ -r $run_file ]] || complain 3 "cannot read the run file $run_file: lines of key = value, the keys of drover run --help"
  topology=$(realpath "$topology") run_file=$(realpath "$run_file")
  nodes=$(of_topology machine.nodes) gpus=$(of_topology machine.gpus_per_node)
  [[ $nodes =~ ^[1-9][0-9]*$ && $gpus =~ ^[0-9]+$ ]] ||
    complain 3 "$topology: [machine] must give nodes and gpus_per_node; it says '$nodes' and '$gpus'"
}

# Ranks of the grid: options win over the topology, 0 is what the machine has left.
ranks_of_grid() {
  local name size product=1 open=0
  for name in tp pp dp; do
    size=$(option $name "$(of_topology "grid.$name")")
    if [[ -z $size ]]; then if [[ $name == dp ]]; then size=0; else size=1; fi; fi
    [[ $size =~ ^[0-9]+$ ]] || complain 2 "$name = $size: expected a whole number"
    if ((size == 0)); then open=1; else product=$((product * size)); fi
  done
  if ((open && gpus > 0)); then product=$((nodes * gpus)); fi
  echo "$product"
}

# What to ask for, for so many ranks.
resources() {  # ranks
  local ranks=$1 places cores of_node
  if ((gpus > 0)); then places=$gpus; else places=$(((ranks + nodes - 1) / nodes)); fi
  of_node=$((ranks < places ? ranks : places))
  ((ranks % of_node == 0)) || complain 2 "$ranks ranks do not go evenly on nodes of $of_node: choose another grid"
  ((ranks / of_node <= nodes)) || complain 2 "$ranks ranks are more than the $nodes x $gpus GPUs of $topology"
  # Rank 0 has LoadGen, the leader, a worker and the watchdog; a CPU rank computes with its cores.
  cores=$(of_topology host.cores)
  if [[ $cores =~ ^[0-9]+$ ]]; then cores=$((cores / of_node)); elif ((gpus > 0)); then cores=4; else cores=1; fi
  if ((cores < 1)); then cores=1; fi
  asked=("--nodes=$((ranks / of_node))" "--ntasks-per-node=$of_node" "--cpus-per-task=$cores")
  if ((gpus > 0)); then asked+=("--gpus-per-node=$of_node"); fi
}

in_job() { [[ -n ${SLURM_JOB_ID:-} && -n ${SLURM_JOB_NODELIST:-} ]]; }

need_sbatch() {
  command -v sbatch >/dev/null ||
    complain 4 "sbatch is not in PATH: this is for a Slurm cluster's login node (module load slurm?). Without Slurm: launch/run.sh"
}

# Submits this script, with its arguments, to run as a job.
submit() {  # sbatch's options… -- the script's arguments
  local options=()
  while [[ $1 != -- ]]; do options+=("$1"); shift; done
  shift
  echo "$script: sbatch ${options[*]} ${sbatch_options[*]}" >&2
  DROVER_ROOT=$root DROVER_BIN=$program sbatch "${options[@]}" "${sbatch_options[@]}" \
    "$root/slurm/$script" "$@"
}

# A run of `ranks` ranks in the job's allocation; each attempt of a requeued job has its own folder
# under `base`, and an accuracy run goes on from the newest journal there. Sets `code`, `out` and what
# `leave` looks at.
run_attempt() {  # base ranks drover's options…
  local base=$1 ranks=$2 attempt=${SLURM_RESTART_COUNT:-0} mode earlier="" known=0 i
  shift 2
  ((ranks <= ${SLURM_NTASKS:-$ranks})) ||
    complain 2 "the grid has $ranks ranks, the job $SLURM_NTASKS tasks: submit with ${asked[*]}"
  out=$base/attempt-$attempt
  mode=$(option mode performance)
  if [[ $mode == *accuracy* ]]; then
    for ((i = attempt - 1; i >= 0; i--)); do
      if [[ -s $base/attempt-$i/accuracy/journal.jsonl ]]; then earlier=$base/attempt-$i; break; fi
    done
  fi
  local arguments=(run --config "$run_file" --topology "$topology" "${extra[@]}" "$@" --out "$out")
  if [[ -n $earlier ]]; then
    # Accuracy is the last pass: one before it was whole.
    known=$(wc -l <"$earlier/accuracy/journal.jsonl")
    without mode
    arguments=(run --config "$run_file" --topology "$topology" "${extra[@]}" "$@" --out "$out"
      --mode accuracy --resume "$earlier")
  fi
  echo "$script: job $SLURM_JOB_ID, attempt $attempt: $ranks ranks on ${SLURM_JOB_NODELIST:-?}, results in $out"
  mkdir -p "$base"
  launch "$ranks" "${arguments[@]}"
  if [[ $code -ne 0 && ! -e $out/result.json && -s $out/accuracy/journal.jsonl ]]; then
    echo "$script: the run could not write its result; its finished samples are kept: --mode accuracy --resume $out" >&2
  fi
  if [[ $warned -eq 1 && $code -eq 5 && $mode == *accuracy* ]]; then look_back "$known"; fi
}

# Sends signals on: Slurm warns the batch script (--signal=B:USR1@…), run.sh and srun tell the ranks.
launch() {  # ranks drover's arguments…
  local ranks=$1 child last
  shift
  warned=0
  trap 'warned=1; kill -USR1 "$child" 2>/dev/null' USR1
  trap 'kill -TERM "$child" 2>/dev/null' TERM
  # srun does not take it from sbatch by itself.
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
  "$root/launch/run.sh" -np "$ranks" --launcher srun --program "$program" -- "$@" &
  child=$!
  while true; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  wait "$child" 2>/dev/null
  last=$?
  if ((last != 127)); then code=$last; fi
  trap - USR1 TERM
}

# Warned in an accuracy pass: it is to go on in the next attempt, unless this one brought nothing.
look_back() {  # samples that were known before
  local journal=$out/accuracy/journal.jsonl
  if [[ ! -s $journal || $(wc -l <"$journal") -le $1 ]]; then
    echo "$script: this attempt finished no further sample: not requeued; give it more time" >&2
    return
  fi
  unfinished=$out
  echo "$script: $(wc -l <"$journal") samples are finished; back into the queue, the next attempt goes on from them" >&2
}

# The attempt from which the next one is to go on.
unfinished=""
# The last line of a job's script: Slurm may end the script as soon as the job is requeued.
leave() {  # exit code
  if [[ -n $unfinished ]] && ! scontrol requeue "$SLURM_JOB_ID"; then
    echo "$script: Slurm refuses to requeue; go on by hand: --mode accuracy --resume $unfinished" >&2
  fi
  exit "$1"
}

# One line of a table for each run that ended; several jobs may write to it.
tell() {  # table columns… (the first line of a new table: their names)
  local table=$1 line
  shift
  line=$(sed -nE -e 's/^  "(valid|output_tokens_per_second|samples|verdict)": (.*[^,]),?$/\1=\2/p' "$out/result.json" 2>/dev/null |
    tr '\n' '\t')
  {
    flock 8
    printf '%s\t%s\t%s\n' "$*" "${line:-no result (exit code $code)}" "$out" >&8
  } 8>>"$table"
}

table_of() {  # base: its table in short
  if [[ -s $1/table.txt ]]; then sort -V "$1/table.txt"; fi
}
