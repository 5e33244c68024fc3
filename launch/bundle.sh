#!/usr/bin/env bash
# A folder that runs drover on another machine of the same or a newer distribution: the installed tree
# and the libraries it needs. Open MPI, the driver, CUDA's and NCCL's libraries are the other machine's.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/bundle.sh [--build DIR] [--out DIR] [--tests] [--archive]
  --build DIR   a built folder (default build/release)
  --out DIR     default build/bundle/drover-VERSION-SYSTEM-MACHINE; replaced if it is a bundle
  --tests       also the programs of the GPU tests, for tests/gpu.sh --binaries
  --archive     also DIR.tar.xz
Needs patchelf. DROVER_XZ_LEVEL (default 9): how hard the archive is packed. bin/drover looks for its libraries in lib/ beside it. lib/spare holds older copies of
libraries that nearly every machine with Open MPI has; launch/run.sh uses them where one is missing.
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
build=${DROVER_BUILD_DIR:-$root/build}/release out="" tests=0 archive=0
while [[ $# -gt 0 ]]; do
  case $1 in
    --build) build=${2:?--build wants a folder}; shift 2 ;;
    --out) out=${2:?--out wants a folder}; shift 2 ;;
    --tests) tests=1; shift ;;
    --archive) archive=1; shift ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; echo "bundle.sh: unknown argument $1" >&2; exit 2 ;;
  esac
done
fail() { echo "bundle.sh: $*" >&2; exit 4; }
[[ -x $build/drover ]] || fail "no drover in $build: build it first (ninja -C $build)"
for tool in patchelf readelf nm strip cmake "${CC:-cc}"; do
  command -v "$tool" >/dev/null || fail "$tool is not in PATH (Debian, Ubuntu: apt-get install patchelf binutils cmake)"
done
version=$("$build/drover" --version | sed -nE '1s/^drover +([^ ]+).*/\1/p')
if [[ -z $out ]]; then
  out=${DROVER_BUILD_DIR:-$root/build}/bundle/drover-${version:-unknown}-$(uname -s | tr '[:upper:]' '[:lower:]')-$(uname -m)
fi
if [[ -e $out && ! -f $out/.bundle ]]; then fail "$out is there and is no bundle: remove it or name another --out"; fi
rm -rf "$out"
mkdir -p "$out"
touch "$out/.bundle"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The machine's own: the C library and the compiler's, MPI, the driver, CUDA, NCCL.
system='^(ld-linux.*|lib(c|m|dl|rt|pthread|resolv|util|stdc\+\+|gcc_s)|libmpi.*|libopen-(pal|rte)|libpmix|libevent.*|libcuda|libcudart|libcublas.*|libnvrtc.*|libnvJitLink|libcupti|libnccl)\.so'
# Nearly every machine's own, at least through Open MPI: two copies in one process would be trouble.
spare='^(libhwloc|libcrypto|libz|libgomp|libudev|libcap)\.so'
# HDF5 has it for files in S3 only, which drover never opens; it would bring thirty more.
unused='^libcurl\.so'

cmake --install "$build" --prefix "$out" --strip >/dev/null
if [[ $tests -eq 1 ]]; then
  cmake --install "$build" --prefix "$out" --strip --component tests >/dev/null
  [[ -f $out/tests/programs.txt ]] || fail "$build has no GPU tests: it was built without CUDA or without tests"
fi
mkdir -p "$out/lib/spare"

is_elf() { [[ -f $1 && ! -L $1 ]] && readelf -h "$1" >/dev/null 2>&1; }
needed() { readelf -d "$1" | sed -nE 's/.*\(NEEDED\).*\[(.*)\]/\1/p'; }

# A library of the same symbols that all give 0, so that whoever calls one gets an error.
stand_in_for() {  # library whose
  local name=${1%%.so*} stub symbol version
  stub=libdrover_no_${name#lib}.so
  nm -D --undefined-only --with-symbol-versions "$2" | sed -nE 's/.* U (curl_[a-z_]+)@+(.*)/\1 \2/p' >"$work/symbols"
  version=$(cut -d ' ' -f 2 "$work/symbols" | sort -u)
  while read -r symbol _; do echo "void *$symbol(void) { return 0; }"; done <"$work/symbols" >"$work/stub.c"
  echo "$version { global: *; };" >"$work/stub.map"
  "${CC:-cc}" -shared -fPIC -O1 -Wl,-soname,"$stub" -Wl,--version-script="$work/stub.map" \
    "$work/stub.c" -o "$out/lib/$stub"
  patchelf --replace-needed "$1" "$stub" "$2"
}

# Copies what `1` needs into the bundle, and what that needs.
take_libraries_of() {  # file where-ldd-looks-from
  local name path
  while read -r name; do
    [[ $name =~ $system ]] && continue
    if [[ $name =~ $unused ]]; then
      stand_in_for "$name" "$1"
      continue
    fi
    [[ -e $out/lib/$name || -e $out/lib/spare/$name ]] && continue
    path=$(ldd "$2" | awk -v name="$name" '$1 == name { print $3 }')
    [[ -f $path ]] || fail "$name, which $2 needs, is not found here"
    if [[ $name =~ $spare ]]; then
      install -m 644 "$path" "$out/lib/spare/$name"
      take_libraries_of "$out/lib/spare/$name" "$path"
    else
      install -m 644 "$path" "$out/lib/$name"
      licence_of "$path"
      take_libraries_of "$out/lib/$name" "$path"
    fi
  done < <(needed "$1")
}

# Debian keeps each package's licence.
licence_of() {
  local package
  package=$(dpkg-query -S "$(realpath "$1")" 2>/dev/null | cut -d : -f 1 | head -n 1) || true
  if [[ -n $package && -f /usr/share/doc/$package/copyright ]]; then
    mkdir -p "$out/share/doc/drover/licences"
    cp -L "/usr/share/doc/$package/copyright" "$out/share/doc/drover/licences/$package"
  fi
}

programs=("$out/bin/drover")
for file in "$out"/tests/*; do
  if is_elf "$file"; then programs+=("$file"); fi
done
for program in "${programs[@]}"; do
  original=$build/drover
  if [[ $program == "$out"/tests/* ]]; then original=$build/tests/$(basename "$program"); fi
  take_libraries_of "$program" "$original"
done
for library in "$out"/lib/*.so* "$out"/lib/spare/*.so*; do
  strip --strip-unneeded "$library"
done
for library in "$out"/lib/*.so*; do patchelf --set-rpath "\$ORIGIN" "$library"; done
for library in "$out"/lib/spare/*.so*; do patchelf --remove-rpath "$library"; done
# Behind the bundle's own: where CUDA lies on machines that do not tell the loader.
for program in "${programs[@]}"; do
  patchelf --set-rpath "\$ORIGIN/../lib:/usr/local/cuda/lib64:/usr/local/cuda/targets/$(uname -m)-linux/lib" "$program"
done

# Nothing else may be asked of the other machine (what its own libraries need is its own affair).
bundled=("${programs[@]}" "$out"/lib/*.so*)
leaks=0
while read -r name; do
  if [[ ! $name =~ $system && ! $name =~ $spare && ! -f $out/lib/$name ]]; then
    echo "bundle.sh: $name is needed, but neither brought along nor the other machine's" >&2
    leaks=1
  fi
done < <(for each in "${bundled[@]}"; do needed "$each"; done | sort -u)
for program in "${programs[@]}"; do
  # Of what is brought along, nothing may be taken from elsewhere.
  while read -r name _ path _; do
    if [[ -f $out/lib/$name && $(realpath "$path") != "$(realpath "$out")"/lib/* ]]; then
      echo "bundle.sh: $(basename "$program") takes $name from $path" >&2
      leaks=1
    fi
  done < <(env -u LD_LIBRARY_PATH ldd "$program")
done
[[ $leaks -eq 0 ]] || fail "the bundle is not whole"
env -u LD_LIBRARY_PATH "$out/bin/drover" --version >/dev/null || fail "the bundle's drover does not start"
newest() {  # what: the newest version of its symbols that the programs ask for
  for each in "${bundled[@]}"; do readelf -V "$each"; done |
    grep -oE "$1_[0-9.]+" | sort -uV | tail -n 1
}
{
  echo "drover ${version:-unknown}, built on $(sed -n 's/^PRETTY_NAME="\(.*\)"/\1/p' /etc/os-release)"
  echo "needs on the machine: a C library with $(newest GLIBC), a C++ library with $(newest GLIBCXX),"
  echo "  and: $(for each in "${programs[@]}"; do needed "$each"; done | grep -E '^lib(mpi|cublasLt|nccl|cuda)' | sort -u | tr '\n' ' ')"
  echo "brings: $(cd "$out/lib" && echo *.so*)"
  echo "spare: $(cd "$out/lib/spare" && echo *.so*)"
} | tee "$out/BUNDLE"
if [[ $archive -eq 1 ]]; then
  tar -C "$(dirname "$out")" --sort=name --owner=0 --group=0 --numeric-owner -c "$(basename "$out")" |
    xz -T 0 "-${DROVER_XZ_LEVEL:-9}" >"$out.tar.xz"
  echo "$out.tar.xz: $(stat -c %s "$out.tar.xz") bytes"
fi
