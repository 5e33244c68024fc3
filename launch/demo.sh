#!/usr/bin/env bash
# From nothing to a result: sets up, builds, prepares a small real model and its questions, runs the
# main job under MLPerf's LoadGen, scores it against the unquantized model, and prints a table.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/demo.sh [--all] [--ranks 1|2|3|6] [--samples N] [--max-new-tokens N] [--out DIR [--force]] [-- drover's options]
  --all               the whole set of questions (default: the first 64)
  --ranks N           6: tensor parallel 3 × pipeline 2; 3: tensor parallel 3; 2: pipeline 2; 1: one
                      rank. Default: one rank a GPU, as far as the model can be divided; without GPUs
                      6 with six cores or more, 2 on fewer
  --max-new-tokens N  longest answer (default 64)
  --out DIR           default build/demo/result, which is replaced each time
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
build=${DROVER_BUILD_DIR:-$root/build}
# shellcheck source=launch/mpi_env.sh
source "$here/mpi_env.sh"

samples=64 new_tokens=64 ranks="" out="" force=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --all) samples=0; shift ;;
    --ranks) ranks=${2:?--ranks wants a number}; shift 2 ;;
    --samples) samples=${2:?--samples wants a number}; shift 2 ;;
    --max-new-tokens) new_tokens=${2:?--max-new-tokens wants a number}; shift 2 ;;
    --out) out=${2:?--out wants a folder}; shift 2 ;;
    --force) force=(--force); shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) usage >&2; echo "demo.sh: unknown argument $1 (drover's own come after --)" >&2; exit 2 ;;
  esac
done
if [[ -z $out ]]; then out=$build/demo/result force=(--force); fi
# The demo's model has 3 KV heads, and is divided on so many ranks.
grid_of() {  # ranks
  case $1 in
    1) echo --tp 1 --pp 1 ;;
    2) echo --tp 1 --pp 2 ;;
    3) echo --tp 3 --pp 1 ;;
    6) echo --tp 3 --pp 2 ;;
    *) return 1 ;;
  esac
}
if [[ -n $ranks ]] && ! grid_of "$ranks" >/dev/null; then
  echo "demo.sh: --ranks $ranks: the demo's model has 3 KV heads; choose 1, 2, 3 or 6" >&2
  exit 2
fi

if [[ -f $root/CMakeLists.txt ]]; then
  "$here/setup.sh"
  echo "demo: building, some minutes, more with CUDA's kernels (DROVER_CUDA=OFF leaves them out); log: $build/demo-build.log"
  if ! { [[ -f $build/release/build.ninja ]] || cmake -S "$root" -B "$build/release" -G Ninja \
    -DCMAKE_BUILD_TYPE=Release ${DROVER_CUDA:+-DDROVER_CUDA="$DROVER_CUDA"}; } >"$build/demo-build.log" 2>&1 ||
    ! ninja -C "$build/release" drover >>"$build/demo-build.log" 2>&1; then
    tail -n 40 "$build/demo-build.log" >&2
    echo "demo.sh: the build failed; all of it is in $build/demo-build.log" >&2
    exit 4
  fi
  program=$build/release/drover
else
  "$here/setup.sh" --no-system
  program=$root/../../bin/drover
fi
"$here/prepare_demo.sh"

cpu_ranks=2 gpus=0 backend=auto
if (($(drover_cores) >= 6)); then cpu_ranks=6; fi
if [[ $("$program" --version) == *backends*cuda* ]]; then gpus=$(drover_gpus); fi
if [[ -n $ranks ]]; then
  cpu_ranks=$ranks
  if ((ranks > gpus)); then backend=cpu; fi
elif ((gpus > 0)); then
  for ranks in 6 3 2 1; do
    if ((ranks <= gpus)); then break; fi
  done
else
  ranks=$cpu_ranks
fi
read -ra grid < <(grid_of "$ranks")
read -ra cpu_grid < <(grid_of "$cpu_ranks")

demo=$build/demo
python=$build/venv/bin/python
common=(run --model "$demo/smollm2-135m.h5" --dataset "$demo/chatterbot.h5" --scenario offline --demo
  --samples "$samples" --max-new-tokens "$new_tokens")
# Exit code 5 means a complete run that LoadGen calls INVALID: the table says so, and so does our own.
# A run's own table is left out: the one at the end has ROUGE, too.
drover_run() {  # ranks, drover's arguments
  local code=0 np=$1
  shift
  "$here/run.sh" -np "$np" --program "$program" -- "$@" >/dev/null || code=$?
  if ((code != 0 && code != 5)); then
    echo "demo.sh: drover ended with exit code $code; its logs are beside the results" >&2
    exit "$code"
  fi
  return "$code"
}

where="on the CPU"
if [[ $backend == auto ]] && ((gpus > 0)); then where="each on a GPU"; fi
echo "demo: the main job, ranks: $ranks $where (${grid[*]}), INT4 weights, FP8 KV"
verdict=0
drover_run "$ranks" "${common[@]}" "${grid[@]}" --backend "$backend" --mode performance,accuracy --out "$out" \
  "${force[@]}" "$@" || verdict=$?

# The same questions without quantized arithmetic: 32-bit activations, 16-bit KV, on the CPU. Kept, by
# its options and by what decides its numbers.
if [[ -d $root/src ]]; then
  sources=$(find "$root"/src/{base,engine,backend,model,store} -type f | sort | xargs cat | sha256sum)
else
  sources=$(sha256sum <"$program")
fi
key=$(printf '%s ' "$samples" "$new_tokens" "${cpu_grid[@]}" "$(<"$demo/.stamp")" "$sources" | sha256sum | cut -c 1-12)
reference=$demo/reference/$key
if [[ ! -f $reference/.scored ]]; then
  echo "demo: the reference, unquantized (kept for the next time)"
  drover_run "$cpu_ranks" "${common[@]}" "${cpu_grid[@]}" --backend cpu --activations f32 --kv bf16 \
    --mode accuracy --out "$reference" --force
  "$python" "$root/data/score.py" "$reference/accuracy/mlperf_log_accuracy.json" \
    --dataset "$demo/chatterbot.h5" --samples "$samples" --result "$reference/result.json" >/dev/null
  touch "$reference/.scored"
fi
"$python" "$root/data/score.py" "$out/accuracy/mlperf_log_accuracy.json" --dataset "$demo/chatterbot.h5" \
  --samples "$samples" --reference "$reference/result.json" --result "$out/result.json" >/dev/null

echo
"$python" "$here/summary.py" "$out" --reference "$reference"
exit "$verdict"
