#!/usr/bin/env bash
# Every shell script through shellcheck; 77 (skipped, to ctest) where it is not installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
command -v shellcheck >/dev/null || { echo "skipped: no shellcheck here"; exit 77; }
mapfile -t files < <(find launch slurm tests .ci -type f \( -name '*.sh' -o -name '*.sbatch' -o -path .ci/run \) | sort)
exec shellcheck -x "${files[@]}"
