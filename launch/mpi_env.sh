# Sourced: what Open MPI needs on this host for drover. Used by launch/run.sh and by the tests.
#   . launch/mpi_env.sh; drover_mpi_env RANKS [HOSTFILE]; mpirun -np RANKS "${DROVER_MPIRUN_FLAGS[@]}" …
# Everything that a variable can say is exported; a setting that is already there is kept.
# shellcheck shell=bash

# Cores this process may use: its affinity, less where a container's quota is smaller.
drover_cores() {
  local cores quota period
  cores=$(nproc)
  if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [[ $quota != max ]]; then
    quota=$(((quota + period - 1) / period))
    if ((quota < cores)); then cores=$quota; fi
  fi
  echo "$cores"
}

# GPUs that a program may use here and the CUDA backend can: compute capability 8.0 or later.
drover_gpus() {
  local capabilities visible=${CUDA_VISIBLE_DEVICES-all} count allowed
  capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null) || { echo 0; return; }
  count=$(awk '$1 >= 8.0' <<<"$capabilities" | wc -l)
  if [[ $visible != all ]]; then
    allowed=$(tr ',' '\n' <<<"$visible" | grep -c '[^[:space:]]') || true
    if ((allowed < count)); then count=$allowed; fi
  fi
  echo "$count"
}

# May one process of ours read another's memory? Containers often refuse; Open MPI then complains of
# every large message.
drover_cma_works() {
  local python
  python=$(command -v python3) || return 1
  "$python" - 2>/dev/null <<'PY'
import ctypes, os, sys, time

class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]

source = ctypes.create_string_buffer(b"drover", 8)
sibling = os.fork()
if sibling == 0:
    time.sleep(5)
    os._exit(0)
reader = os.fork()
if reader == 0:
    target = ctypes.create_string_buffer(8)
    ours = Vector(ctypes.cast(target, ctypes.c_void_p), 8)
    theirs = Vector(ctypes.cast(source, ctypes.c_void_p), 8)
    read = ctypes.CDLL(None).process_vm_readv
    read.restype = ctypes.c_ssize_t
    got = read(sibling, ctypes.byref(ours), ctypes.c_ulong(1), ctypes.byref(theirs),
               ctypes.c_ulong(1), ctypes.c_ulong(0))
    os._exit(0 if got == 8 and target.raw[:6] == b"drover" else 1)
_, status = os.waitpid(reader, 0)
os.kill(sibling, 9)
os.waitpid(sibling, 0)
sys.exit(0 if status == 0 else 1)
PY
}

drover_in_container() {
  [[ -e /.dockerenv || -e /run/.containerenv || -n ${container:-} || -n ${APPTAINER_NAME:-} ||
    -n ${SINGULARITY_NAME:-} ]] || grep -qE 'docker|containerd|kubepods|lxc' /proc/1/cgroup 2>/dev/null
}

# Slots named in a hostfile (a host without `slots=` counts once).
drover_hostfile_slots() {
  sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$1" |
    awk '{ n = 1; if (match($0, /slots *= *[0-9]+/)) { s = substr($0, RSTART, RLENGTH); gsub(/[^0-9]/, "", s); n = s } total += n } END { print total + 0 }'
}

drover_mpi_env() {  # ranks [hostfile]
  local ranks=$1 hostfile=${2:-} cores hosts=1 here
  cores=$(drover_cores)
  DROVER_MPIRUN_FLAGS=()
  if [[ -n $hostfile ]]; then
    hosts=$(sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$hostfile" | wc -l)
    DROVER_MPIRUN_FLAGS+=(--hostfile "$hostfile")
  fi
  here=$(((ranks + hosts - 1) / hosts))

  # Seconds from a rank's death until mpirun terminates the others, and again until it kills them:
  # they use them to agree on the first cause and to write it down. Open MPI's own default is 1.
  # It sleeps through them after every failed run, so more is not better.
  export OMPI_MCA_odls_base_sigkill_timeout=${OMPI_MCA_odls_base_sigkill_timeout:-3}
  # A host whose network is gone says nothing: mpirun would wait for it for ten minutes after drover has
  # ended. Asked after two seconds of silence and each second then, four times, it notices as soon as
  # drover does (7 s).
  export OMPI_MCA_oob_tcp_keepalive_time=${OMPI_MCA_oob_tcp_keepalive_time:-2}
  export OMPI_MCA_oob_tcp_keepalive_intvl=${OMPI_MCA_oob_tcp_keepalive_intvl:-1}
  export OMPI_MCA_oob_tcp_keepalive_probes=${OMPI_MCA_oob_tcp_keepalive_probes:-4}
  if [[ $EUID -eq 0 ]]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  fi
  # More ranks than slots: a batch system's allocation and a hostfile say their own slots.
  local slots=$cores
  if [[ -n $hostfile ]]; then
    slots=$(drover_hostfile_slots "$hostfile")
  elif [[ -n ${SLURM_JOB_ID:-} || -n ${PBS_JOBID:-} || -n ${LSB_JOBID:-} ]]; then
    slots=$ranks
  else
    # Open MPI counts cores, nproc counts hardware threads: allow what fits the threads.
    export OMPI_MCA_rmaps_base_oversubscribe=${OMPI_MCA_rmaps_base_oversubscribe:-1}
  fi
  if ((ranks > slots)); then
    export OMPI_MCA_rmaps_base_oversubscribe=1
    # A rank that waits gives its core to one that works.
    export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1}
  fi
  if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    export OMP_NUM_THREADS=$((cores > here ? cores / here : 1))
  fi
  # Open MPI would bind each rank to one core. drover's ranks share out themselves what they are given,
  # near their GPUs (src/machine/placement.h). The second name is Open MPI 5's.
  export OMPI_MCA_hwloc_base_binding_policy=${OMPI_MCA_hwloc_base_binding_policy:-none}
  export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy:-none}
  if [[ -z ${OMPI_MCA_btl_vader_single_copy_mechanism:-} ]] && drover_in_container &&
    ! drover_cma_works; then
    export OMPI_MCA_btl_vader_single_copy_mechanism=none
  fi
}
