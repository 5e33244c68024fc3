#!/usr/bin/env bash
# Sets up, builds and runs the tests; works from a fresh clone without arguments.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: tests/run.sh [--slow] [--label LABEL] [--preset release|dev|cuda|asan|tsan] [-- ctest's options]
  --slow         the tests labelled slow, too
  --label LABEL  only these: fast, mpi, e2e, slurm, gpu, slow (a regular expression)
The results as JUnit: build/PRESET/junit.xml.
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=${DROVER_BUILD_DIR:-$root/build}
preset=release slow=0 label=""
while [[ $# -gt 0 ]]; do
  case $1 in
    --slow) slow=1; shift ;;
    --label) label=${2:?--label wants a label}; shift 2 ;;
    --preset) preset=${2:?--preset wants a name}; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) usage >&2; echo "run.sh: unknown argument $1" >&2; exit 2 ;;
  esac
done
exec </dev/null

"$root/launch/setup.sh" --tests
cd "$root"
folder=$build/$preset
if [[ ! -f $folder/build.ninja ]]; then
  cmake --preset "$preset" -B "$folder"
fi
cmake --build "$folder"
"$root/launch/prepare_demo.sh"

select=()
if [[ -n $label ]]; then select+=(-L "$label"); fi
if [[ $slow -eq 0 && $label != *slow* ]]; then select+=(-LE slow); fi
case $preset in
  asan)
    export LSAN_OPTIONS="suppressions=$root/tests/lint/lsan.supp:print_suppressions=0"
    export UBSAN_OPTIONS="print_stacktrace=1"
    ;;
  tsan) export TSAN_OPTIONS="suppressions=$root/tests/lint/tsan.supp:halt_on_error=1" ;;
esac
export DROVER_BIN=$folder/drover DROVER_DEMO=$build/demo
exec ctest --test-dir "$folder" --output-on-failure -j "$(nproc)" \
  --output-junit "$folder/junit.xml" "${select[@]}" "$@"
