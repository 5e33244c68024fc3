#!/usr/bin/env bash
# clang-format 14 over the C++ sources; --fix rewrites them. 77 (skipped, to ctest) without it: other
# versions format differently.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tool=""
for candidate in clang-format-14 clang-format; do
  if "$candidate" --version 2>/dev/null | grep -q 'version 14\.'; then tool=$candidate; break; fi
done
if [[ -z $tool ]]; then echo "skipped: no clang-format 14 here"; exit 77; fi
mapfile -t files < <(find src tests -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | sort)
if [[ ${1:-} == --fix ]]; then exec "$tool" -i "${files[@]}"; fi
if ! complaints=$("$tool" --dry-run --Werror "${files[@]}" 2>&1); then
  grep -E 'error:' <<<"$complaints" | cut -d : -f 1 | sort | uniq -c | sort -rn
  echo "these are not formatted (lines each): tests/lint/format.sh --fix"
  exit 1
fi
echo "${#files[@]} files are formatted"
