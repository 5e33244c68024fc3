#!/usr/bin/env bash
# Everything drover needs to be built and tried: system packages, a Python environment for the data
# tools, LoadGen, and the demo's model and questions. Safe to run again: it does only what is missing.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/setup.sh [--download-only | --offline] [--no-system] [--python-only] [--tests]
  (nothing)        install what is missing (Debian, Ubuntu with root or sudo), fetch, unpack
  --download-only  fetch everything into build/cache and stop: for a login node with a network
  --offline        use build/cache only; also chosen by itself when the cache is complete
  --no-system      do not look at system packages
  --python-only    the Python environment for data/, nothing else
  --tests          also what the tests need (pytest), and use where it is there (slurm-wlm, munge, iproute2)
Settings: DROVER_BUILD_DIR (default build), DROVER_PYTHON (default: the first python3 that will do).
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
build=${DROVER_BUILD_DIR:-$root/build}
cache=$build/cache
log=$build/setup.log
python_least="3, 11"
mode=full system=1 assets=1 tests=0
for argument in "$@"; do
  case $argument in
    --download-only) mode=download system=0 tests=1 ;;
    --offline) mode=offline ;;
    --no-system) system=0 ;;
    --python-only) system=0 assets=0 ;;
    --tests) tests=1 ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; echo "setup: unknown argument $argument" >&2; exit 2 ;;
  esac
done
mkdir -p "$cache"
# One set-up at a time in one folder.
exec 9>"$build/.setup.lock"
if command -v flock >/dev/null; then flock 9; fi
: >"$log"

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 4; }
# Runs a noisy command; shows its output only when it fails.
quietly() {
  if ! "$@" >>"$log" 2>&1; then
    tail -n 25 "$log" >&2
    return 1
  fi
}
# shellcheck source=launch/system_needs.sh
source "$here/system_needs.sh"

can_apt() {
  command -v apt-get >/dev/null &&
    { [[ $EUID -eq 0 ]] || { command -v sudo >/dev/null && sudo -n true 2>/dev/null; }; }
}

find_python() {
  local candidate
  for candidate in ${DROVER_PYTHON:-} /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c "import sys, venv, ensurepip; sys.exit(sys.version_info < ($python_least))" \
      >/dev/null 2>&1; then
      python=$(command -v "$candidate")
      return 0
    fi
  done
  return 1
}

set_up_system() {
  local packages=() row
  find_missing
  for row in "${missing[@]}"; do packages+=("${row%%|*}"); done
  if [[ -x $build/venv/bin/python ]] || find_python; then :; else packages+=(python3-venv); fi
  if [[ ${#packages[@]} -eq 0 ]]; then return; fi
  if can_apt && [[ $mode != offline ]]; then
    for row in "${wishes[@]}"; do command -v "$row" >/dev/null || packages+=("$row"); done
    say "installing ${packages[*]}"
    quietly apt_install "${packages[@]}" || fail "apt-get could not install: ${packages[*]} (see $log)"
    find_missing
  fi
  if [[ ${#missing[@]} -gt 0 ]]; then
    tell_missing
    fail "load or install these, then run launch/setup.sh again"
  fi
}

# A Slurm and several hosts for the tests: nothing of it is started or set up (RUNLEVEL says so to Debian).
set_up_test_wishes() {
  local row packages=()
  for row in "${test_wishes[@]}"; do command -v "${row% *}" >/dev/null || packages+=("${row#* }"); done
  if [[ ${#packages[@]} -eq 0 || $mode == offline ]] || ! can_apt; then return 0; fi
  say "installing ${packages[*]} for the tests"
  RUNLEVEL=1 quietly apt_install "${packages[@]}" ||
    say "${packages[*]}: not installed (see $log); the tests that want them will be skipped"
}

hash_of() { sha256sum "$1" | cut -d ' ' -f 1; }

# The cache has a file with this hash under this name pattern?
cached() {  # pattern hash
  local file
  # shellcheck disable=SC2086,SC2231  # a pattern, on purpose
  for file in $cache/$1; do
    [[ -f $file && $(hash_of "$file") == "$2" ]] && return 0
  done
  return 1
}

# Rows of downloads.txt: name version hash.
pinned() { sed -nE 's/^([A-Za-z0-9_-]+)==([^ ]+) --hash=sha256:([0-9a-f]+)$/\1 \2 \3/p' "$here/downloads.txt"; }

missing_downloads() {
  local name version hash
  while read -r name version hash; do
    cached "${name//-/_}-$version*" "$hash" || echo "$name==$version"
  done < <(pinned)
}

set_up_downloads() {
  local wanted
  wanted=$(missing_downloads)
  if [[ -n $wanted ]]; then
    if [[ $mode == offline ]]; then
      fail "not in $cache: ${wanted//$'\n'/, }. Run launch/setup.sh --download-only where there is a network"
    fi
    say "downloading ${wanted//$'\n'/, }"
    quietly "$build/venv/bin/python" -m pip download --no-deps --require-hashes -d "$cache" \
      -r "$here/downloads.txt" || fail "download failed (see $log)"
    wanted=$(missing_downloads)
    [[ -z $wanted ]] || fail "downloaded, but the hash is not the one in launch/downloads.txt: $wanted"
  fi
}

# LoadGen's folder is compared with the package each time: it must be unmodified.
unpack_loadgen() {
  local archive fresh target
  archive=$cache/$(pinned | sed -nE 's/^mlcommons-loadgen ([^ ]+) .*/mlcommons_loadgen-\1.tar.gz/p')
  target=$build/deps/$(basename "$archive" .tar.gz)
  mkdir -p "$build/deps"
  fresh=$(mktemp -d "$build/deps/.unpack.XXXXXX")
  tar -xzf "$archive" -C "$fresh" --no-same-owner
  if ! diff -rq "$fresh/$(basename "$target")" "$target" >/dev/null 2>&1; then
    rm -rf "$target"
    mv "$fresh/$(basename "$target")" "$target"
    say "LoadGen unpacked: ${target#"$root"/}"
  fi
  rm -rf "$fresh"
}

requirement_files() {
  echo "$root/data/requirements.txt"
  echo "$root/launch/requirements.txt"
  if [[ $tests -eq 1 && -f $root/tests/requirements.txt ]]; then echo "$root/tests/requirements.txt"; fi
}

# A stamp names what was installed, or downloaded, and for which Python.
stamp_of() { { "$1" -c 'import sys; print(sys.version)'; xargs cat < <(requirement_files); } | sha256sum; }

set_up_python() {
  local venv=$build/venv stamp wheels=$cache/wheels files=() file source=()
  if [[ ! -x $venv/bin/python ]] || ! "$venv/bin/python" -c "import pip" 2>/dev/null; then
    find_python || fail "no python3 of at least ${python_least/, /.} that can make an environment (module venv). \
Try: module load python, apt-get install python3-venv, or name one: DROVER_PYTHON=…"
    rm -rf "$venv"
    say "Python environment with $python"
    quietly "$python" -m venv "$venv" || fail "$python -m venv failed (see $log)"
  fi
  while read -r file; do files+=(-r "$file"); done < <(requirement_files)
  stamp=$(stamp_of "$venv/bin/python")
  if [[ $mode == download ]]; then
    if [[ ! -f $wheels/.complete || $(<"$wheels/.complete") != "$stamp" ]]; then
      say "downloading the Python packages"
      mkdir -p "$wheels"
      quietly "$venv/bin/python" -m pip wheel --use-pep517 -w "$wheels" "${files[@]}" || fail "download failed (see $log)"
      echo "$stamp" >"$wheels/.complete"
    fi
    return
  fi
  if grep -qxF -- "$stamp" "$venv/.installed" 2>/dev/null; then return; fi
  if [[ $mode == offline || ( -f $wheels/.complete && $(<"$wheels/.complete") == "$(tests=1 stamp_of "$venv/bin/python")" ) ]]; then
    source=(--no-index --find-links "$wheels")
  fi
  if [[ ${#source[@]} -gt 0 && ! -f $wheels/.complete ]]; then
    fail "the Python packages are not in $wheels. Run launch/setup.sh --download-only where there is a network"
  fi
  say "installing the Python packages${source:+ from $wheels}"
  quietly "$venv/bin/python" -m pip install "${source[@]}" "${files[@]}" ||
    fail "the Python packages could not be installed (see $log)"
  # What serves the tests serves the data tools alone, too.
  { echo "$stamp"; tests=0 stamp_of "$venv/bin/python"; } >"$venv/.installed"
}

began=$SECONDS
if [[ $system -eq 1 ]]; then set_up_system; fi
if [[ $system -eq 1 && $tests -eq 1 ]]; then set_up_test_wishes; fi
set_up_python
if [[ $assets -eq 1 ]]; then
  set_up_downloads
  unpack_loadgen
fi
if [[ $mode == download ]]; then
  say "all downloads are in $cache; what follows needs no network (launch/setup.sh --offline)"
else
  say "ready ($((SECONDS - began)) s)"
fi
