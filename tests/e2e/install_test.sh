#!/usr/bin/env bash
# install_test.sh CMAKE BUILD: the installed tree runs from where it is put, and is put elsewhere.
set -euo pipefail
cmake=$1 build=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$cmake" --install "$build" --prefix "$work/first" >/dev/null
mv "$work/first" "$work/second place"
tree="$work/second place"
cd /
"$tree/bin/drover" --version
said=$(env -u DROVER_BIN "$tree/share/drover/launch/run.sh" -np 1 -- --version 2>&1)
grep -q "second place/bin/drover\|second\\\\ place/bin/drover" <<<"$said" || {
  echo "run.sh did not start the installed drover:" "$said"
  exit 1
}
for file in data/import_gguf.py data/score.py data/FORMAT.md launch/setup.sh launch/downloads.txt topology/cpu.ini; do
  [[ -f $tree/share/drover/$file ]] || { echo "missing in the installed tree: $file"; exit 1; }
done
