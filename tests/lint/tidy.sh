#!/usr/bin/env bash
# clang-tidy with warnings as errors, on request: tests/lint/tidy.sh [build folder] [files…]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=${1:-build/release}
shift || true
command -v clang-tidy >/dev/null || { echo "tidy.sh: no clang-tidy here: apt-get install clang-tidy" >&2; exit 4; }
[[ -f $folder/compile_commands.json ]] || { echo "tidy.sh: configure $folder first" >&2; exit 4; }
files=("$@")
if [[ ${#files[@]} -eq 0 ]]; then mapfile -t files < <(find src -name '*.cc' | sort); fi
printf '%s\0' "${files[@]}" | xargs -0 -n 1 -P "$(nproc)" clang-tidy --quiet -p "$folder"
