#!/usr/bin/env bash
# The GPU tests and benches on a machine with GPUs and without a network, and what must be brought there.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: tests/gpu.sh --pack DIR [--bundle FOLDER] [--python 3.12] [--part-mib 58]
       tests/gpu.sh [--deps DIR] [--binaries FOLDER] [--only build|tests|e2e|bench]… [--out DIR]
                    [--sanitize TOOL] [--filter REGEX] [--seconds N] [--commit ID] [--arch LIST]
Here, with a network and after tests/run.sh:
  --pack DIR       what the other machine lacks, in DIR/1, DIR/2, … of at most --part-mib each: the demo's
                   model and questions, LoadGen, oneDNN, Boost.Program_options, Python packages, the
                   CPU's answers to the demo's questions, and the FOLDER of launch/bundle.sh --tests
There, with CUDA 12 or later, Open MPI, Python with pytest, h5py and numpy:
  --deps DIR       a DIR of --pack; unpacked into DIR/unpacked at first use
  --binaries DIR   a bundle made with --tests, instead of a build (default: the one in --deps)
  --only WHAT      build: configure and compile here; tests: the C++ programs; e2e: pytest; bench.
                   Several may be given. Default: tests, e2e and bench, and build without a bundle
  --sanitize TOOL  the C++ programs under compute-sanitizer: memcheck, racecheck, initcheck or synccheck
  --filter REGEX   only programs, pytest files and benches whose name matches
  --seconds N      stop after that time; what is left counts as skipped (default: no limit)
  --commit ID      what gpu.json calls the commit (default: what drover --version says)
  --out DIR        gpu.json (the summary) and logs.tar.gz; default $OUT, else build/gpu/out
  --arch LIST      CMAKE_CUDA_ARCHITECTURES of the build; default: the GPU's own
Ends with 1 if anything failed.
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=${DROVER_BUILD_DIR:-$root/build}
pack="" bundle="" python_version=3.12 part_mib=58 deps="" binaries="" only=() out=${OUT:-$build/gpu/out}
filter="" seconds=0 commit="" arch="" sanitize=()
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --pack) pack=${2:?--pack wants a folder}; shift 2 ;;
    --bundle) bundle=${2:?--bundle wants a folder}; shift 2 ;;
    --python) python_version=${2:?--python wants a version}; shift 2 ;;
    --part-mib) part_mib=${2:?--part-mib wants a number}; shift 2 ;;
    --deps) deps=${2:?--deps wants a folder}; shift 2 ;;
    --binaries) binaries=${2:?--binaries wants a folder}; shift 2 ;;
    --only)
      case ${2:-} in
        build | tests | e2e | bench) only+=("$2") ;;
        *) echo "gpu.sh: --only ${2:-}: expected build, tests, e2e or bench" >&2; exit 2 ;;
      esac
      shift 2 ;;
    --out) out=${2:?--out wants a folder}; shift 2 ;;
    --sanitize) sanitize=(--sanitize "${2:?--sanitize wants a tool}"); shift 2 ;;
    --filter) filter=${2:?--filter wants an expression}; shift 2 ;;
    --seconds) seconds=${2:?--seconds wants a number}; shift 2 ;;
    --commit) commit=${2:?--commit wants an id}; shift 2 ;;
    --arch) arch=${2:?--arch wants a list}; shift 2 ;;
    *) usage >&2; echo "gpu.sh: unknown argument $1" >&2; exit 2 ;;
  esac
done
say() { echo "gpu.sh: $*"; }
fail() { echo "gpu.sh: $*" >&2; exit 4; }

# --- here: gather ---------------------------------------------------------------------------------

# All files that a header reads, itself among them.
headers_of() {
  echo "#include <$1>" | "${CXX:-c++}" -std=c++20 -x c++ -M - | grep -oE '/[^ :\]+' | sort -u
}

# Headers that the sources' use of Boost reads, and the library they belong to, which is the only one
# that suits them.
pack_boost() {  # into
  local library header
  library=$("${CXX:-c++}" -print-file-name=libboost_program_options.a)
  [[ -f $library ]] || fail "no libboost_program_options.a here"
  install -Dm 644 "$library" "$1/lib/libboost_program_options.a"
  # FindBoost of the other machine reads version.hpp.
  for header in $(headers_of boost/program_options.hpp) $(headers_of boost/version.hpp); do
    if [[ $header == */include/boost/* ]]; then
      install -Dm 644 "$header" "$1/include/boost/${header##*/include/boost/}"
    fi
  done
}

pack_dnnl() {  # into
  local library header name
  library=$(ldd "$build/release/drover" | awk '/libdnnl/ { print $3 }')
  install -Dm 644 "$library" "$1/lib/$(basename "$library")"
  ln -sf "$(basename "$library")" "$1/lib/libdnnl.so"
  name=$(ldd "$library" | awk '/libOpenCL/ { print $3 }')
  if [[ -n $name ]]; then install -Dm 644 "$name" "$1/lib/$(basename "$name")"; fi
  for header in $(headers_of oneapi/dnnl/dnnl.hpp); do
    if [[ $header == */oneapi/dnnl/* ]]; then
      install -Dm 644 "$header" "$1/include/oneapi/dnnl/${header##*/oneapi/dnnl/}"
    fi
  done
}

# What the data tools' scorer needs and a machine for deep learning seldom has: of our own environment,
# but the one with machine code, which is for the other machine's Python.
pack_python() {  # into
  local python=$build/venv/bin/python wheels name from
  from=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  mkdir -p "$1"
  for name in rouge_score nltk defusedxml; do
    cp -r "$from/$name" "$1/"
  done
  wheels=$(mktemp -d)
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$python_version" \
    --implementation cp --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux_2_28_x86_64 -d "$wheels" \
    "google-crc32c==$("$python" -c 'import importlib.metadata as m; print(m.version("google-crc32c"))')"
  "$python" -m zipfile -e "$wheels"/*.whl "$1"
  rm -rf "$wheels"
  find "$1" -name __pycache__ -prune -exec rm -rf {} +
}

# The CPU's answers to all of the demo's questions in each format, for ROUGE beside the GPU's: minutes,
# so they are kept as long as what decides them stays the same.
pack_cpu_runs() {  # into
  local program=$build/release/drover runs=$build/demo/cpu-runs stamp activations kv name
  if [[ -n $bundle ]]; then program=$bundle/bin/drover; fi
  stamp=$(find "$root"/src/{base,engine,backend/cpu,model,store} -type f | sort | xargs cat | sha256sum)
  for activations in bf16 fp8; do
    for kv in bf16 fp8; do
      name=cpu-$activations-$kv
      if [[ ! -f $runs/$name/.stamp || $(<"$runs/$name/.stamp") != "$stamp" ]]; then
        say "the CPU's answers with $activations activations and $kv KV"
        "$root/launch/run.sh" -np 1 --program "$program" -- run --demo --mode accuracy --samples 0 \
          --model "$build/demo/smollm2-135m.h5" --dataset "$build/demo/chatterbot.h5" --max-new-tokens 64 \
          --backend cpu --activations "$activations" --kv "$kv" --progress no --out "$runs/$name" --force \
          >"$work/run.log" 2>&1 || { tail -n 20 "$work/run.log" >&2; fail "the run failed"; }
        echo "$stamp" >"$runs/$name/.stamp"
      fi
      install -Dm 644 "$runs/$name/result.json" "$1/$name/result.json"
      install -Dm 644 "$runs/$name/accuracy/mlperf_log_accuracy.json" "$1/$name/accuracy/mlperf_log_accuracy.json"
    done
  done
}

pack_all() {
  local work parts=1
  [[ -x $build/release/drover && -f $build/demo/smollm2-135m.h5 ]] || fail "run tests/run.sh first: the pack takes the demo and the libraries from it"
  [[ ! -e $pack || -f $pack/.pack ]] || fail "$pack is there and is no pack: remove it or name another folder"
  rm -rf "$pack"
  mkdir -p "$pack"
  touch "$pack/.pack"
  work=$(mktemp -d)
  # shellcheck disable=SC2064  # as it is now
  trap "rm -rf '$work'" EXIT
  local small=$work/small
  pack_boost "$small/deps"
  pack_dnnl "$small/deps"
  pack_python "$small/site"
  mkdir -p "$small/loadgen" "$small/demo"
  cp -r "$build"/deps/mlcommons_loadgen-* "$small/loadgen/"
  cp "$build/demo/chatterbot.h5" "$small/demo/"
  if [[ -n $bundle ]]; then
    [[ -f $bundle/tests/programs.txt ]] || fail "$bundle was not made by launch/bundle.sh --tests"
    cp -r "$bundle" "$small/bundle"
  fi
  pack_cpu_runs "$small/cpu-runs"
  say "compressing (a minute or two)"
  tar -C "$small" --sort=name --owner=0 --group=0 -c . | xz -T 0 -9 >"$work/small.tar.xz"
  # Blocks, so that many cores unpack it; 4-bit codes hardly get smaller, so no effort is made.
  xz -T 0 -1 --block-size=8MiB -c "$build/demo/smollm2-135m.h5" >"$work/model.xz"
  # One stream of bytes, cut: what the C++ tests need comes first.
  cat "$work/small.tar.xz" "$work/model.xz" >"$work/all"
  (cd "$pack" && split -b "${part_mib}M" -d -a 1 --numeric-suffixes=1 "$work/all" part.)
  for part in "$pack"/part.*; do
    mkdir "$pack/$parts"
    mv "$part" "$pack/$parts/part"
    stat -c %s "$work/small.tar.xz" >"$pack/$parts/small-bytes"
    stat -c %s "$work/all" >"$pack/$parts/all-bytes"
    say "$pack/$parts: $(stat -c %s "$pack/$parts/part") bytes"
    parts=$((parts + 1))
  done
}

# --- there: unpack, build, run --------------------------------------------------------------------

unpacked="" demo=""
unpack() {
  local small all
  unpacked=$deps/unpacked
  [[ -f $deps/1/part ]] || fail "no $deps/1/part: name the folder that --pack made"
  mkdir -p "$unpacked"
  small=$(<"$deps/1/small-bytes")
  all=$(<"$deps/1/all-bytes")
  if [[ ! -f $unpacked/.small ]]; then
    [[ $(stat -c %s "$deps/1/part") -ge $small ]] || fail "the libraries do not fit into the first part: pack again with a larger --part-mib"
    head -c "$small" "$deps/1/part" | tar -C "$unpacked" -xJ
    touch "$unpacked/.small"
  fi
  if [[ ! -f $unpacked/.model ]]; then
    if [[ $(cat "$deps"/[1-9]/part | wc -c) -eq $all ]]; then
      cat "$deps"/[1-9]/part | tail -c +"$((small + 1))" | xz -T 0 -d >"$unpacked/demo/smollm2-135m.h5"
      touch "$unpacked/.model"
    else
      say "not all parts of the pack are here: the demo's model is missing, and tests of it are skipped"
    fi
  fi
  demo=$unpacked/demo
}

configure_and_build() {
  local options=(-DDROVER_CUDA=ON -DCMAKE_BUILD_TYPE=Release -DDROVER_CHECK_FORMAT=OFF)
  if [[ -z $arch ]]; then
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | tr -d . | sed 's/^90$/90a/' | paste -sd ';')
  fi
  options+=("-DCMAKE_CUDA_ARCHITECTURES=$arch")
  if [[ -n $unpacked ]]; then
    options+=("-DDROVER_LOADGEN_DIR=$(echo "$unpacked"/loadgen/mlcommons_loadgen-*)")
    # Only what this machine lacks.
    if ! [[ -e $("${CXX:-c++}" -print-file-name=libdnnl.so) ]]; then
      options+=("-DDNNL_LIBRARY=$unpacked/deps/lib/libdnnl.so" "-DDNNL_INCLUDE_DIR=$unpacked/deps/include")
    fi
    if ! [[ -e $("${CXX:-c++}" -print-file-name=libboost_program_options.so) ||
      -e $("${CXX:-c++}" -print-file-name=libboost_program_options.a) ]]; then
      options+=(-DBoost_NO_BOOST_CMAKE=ON -DBoost_NO_SYSTEM_PATHS=ON "-DBOOST_ROOT=$unpacked/deps" -DBoost_USE_STATIC_LIBS=ON)
    fi
  fi
  say "building for $arch"
  cmake -S "$root" -B "$build/gpu/release" -G Ninja "${options[@]}" >"$out/logs/configure.log" 2>&1 ||
    { tail -n 30 "$out/logs/configure.log" >&2; fail "cmake failed"; }
  grep 'drover:' "$out/logs/configure.log" || true
  # -k 0: what does compile can be tested.
  ninja -C "$build/gpu/release" -k 0 >"$out/logs/build.log" 2>&1 ||
    { grep -E 'error|FAILED' "$out/logs/build.log" | head -n 30 >&2; say "the build failed in parts"; built=1; }
  cp "$build/gpu/release/.ninja_log" "$out/logs/ninja_log"
}

if [[ -n $pack ]]; then
  pack_all
  exit 0
fi
mkdir -p "$out/logs"
built=0
if [[ -n $deps ]]; then unpack; fi
if [[ -z $binaries && -n $unpacked && -d $unpacked/bundle ]]; then binaries=$unpacked/bundle; fi
if [[ ${#only[@]} -eq 0 ]]; then
  only=(tests e2e bench)
  if [[ -z $binaries ]]; then only=(build "${only[@]}"); fi
fi
if [[ " ${only[*]} " == *" build "* ]]; then
  configure_and_build
  binaries=$build/gpu/release
fi
if [[ -z $binaries ]]; then binaries=$build/gpu/release; fi
if [[ -n $unpacked && -d $unpacked/cpu-runs ]]; then export DROVER_CPU_RUNS=$unpacked/cpu-runs; fi
if [[ -n $unpacked ]]; then export PYTHONPATH=$unpacked/site${PYTHONPATH:+:$PYTHONPATH}; fi
if [[ -z $demo ]]; then demo=$build/demo; fi
python=${DROVER_PYTHON:-}
if [[ -z $python ]]; then
  python=python3
  if [[ -x $build/venv/bin/python ]]; then python=$build/venv/bin/python; fi
fi
code=0
DROVER_DEMO=$demo "$python" "$root/tests/gpu/run_gpu.py" --binaries "$binaries" --out "$out" \
  --commit "$commit" --seconds "$seconds" --filter "$filter" "${sanitize[@]}" "${only[@]/#/--only=}" || code=$?
tar -C "$out" --remove-files -czf "$out/logs.tar.gz" logs
if ((built != 0 && code == 0)); then code=1; fi
exit "$code"
