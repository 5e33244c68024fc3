#!/usr/bin/env bash
# bundle_test.sh BUILD: a bundle's archive, unpacked elsewhere, starts ranks with the bundle's libraries,
# also where the machine has no hwloc of its own to be found.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
build=$1
if ! command -v patchelf >/dev/null; then
  echo "patchelf is not there: skipped"
  exit 77
fi
if readelf -d "$build/drover" | grep -qE 'lib(a|t|ub)san'; then
  echo "a build with sanitizers is not bundled: skipped"
  exit 77
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
DROVER_XZ_LEVEL=1 "$root/launch/bundle.sh" --build "$build" --out "$work/made/drover" --archive >"$work/log" || { cat "$work/log"; exit 1; }
mkdir "$work/another place"
tar -xJf "$work/made/drover.tar.xz" -C "$work/another place"
rm -rf "$work/made"
tree="$work/another place/drover"
cd /
said=$(env -u DROVER_BIN "$tree/share/drover/launch/run.sh" -np 2 --print-placement -- run --pp 2 2>"$work/err") || { cat "$work/err"; exit 1; }
[[ $(grep -cE '^ +[01] ' <<<"$said") == 2 ]] || { echo "no placement of two ranks:" "$said"; exit 1; }
env -u DROVER_BIN "$tree/bin/drover" doctor --backend cpu >"$work/doctor" || { cat "$work/doctor"; exit 1; }
for file in launch/drover.def topology/cpu.ini; do
  [[ -f $tree/share/drover/$file ]] || { echo "not in the bundle: $file"; exit 1; }
done
# hwloc is the machine's where Open MPI has it, and lies in spare where it is not.
[[ -f $(echo "$tree"/lib/spare/libhwloc.so.*) ]] || { echo "no spare hwloc"; exit 1; }
needed=$(readelf -d "$tree/bin/drover" | sed -nE 's/.*\(NEEDED\).*\[(.*)\]/\1/p')
if grep -q nvidia <<<"$needed"; then
  echo "drover wants the driver's library to start: $needed"
  exit 1
fi
