# Sourced by setup.sh: what drover needs from the system, how it is looked for, and how it is got.
# shellcheck shell=bash

# Debian package | what it is | header, or program with its smallest version | module | folder variables
needs=(
  "g++|C++20 compiler|program:${CXX:-g++}:11|gcc|"
  "cmake|CMake|program:cmake:3.22|cmake|"
  "ninja-build|Ninja|program:ninja:1.10|ninja|"
  "openmpi-bin|Open MPI, mpirun|program:mpirun:4.0|openmpi|"
  "libopenmpi-dev|Open MPI, for building|program:mpicxx:|openmpi|"
  "libhdf5-dev|HDF5, C library, serial|header:hdf5.h|hdf5|HDF5"
  "libboost-program-options-dev|Boost.Program_options|header:boost/program_options.hpp|boost|BOOST"
  "libfmt-dev|fmt|header:fmt/format.h|fmt|FMT"
  "libspdlog-dev|spdlog|header:spdlog/spdlog.h|spdlog|SPDLOG"
  "nlohmann-json3-dev|nlohmann/json|header:nlohmann/json.hpp|nlohmann_json|NLOHMANN_JSON"
  "libhwloc-dev|hwloc|header:hwloc.h|hwloc|HWLOC"
  "libdnnl-dev|oneDNN|header:oneapi/dnnl/dnnl.hpp|onednn|ONEDNN DNNL"
  "libssl-dev|OpenSSL|header:openssl/evp.h|openssl|OPENSSL"
  "libgtest-dev|GoogleTest|header:gtest/gtest.h|googletest|GTEST GOOGLETEST"
  "libbenchmark-dev|Google Benchmark|header:benchmark/benchmark.h|benchmark|BENCHMARK"
)
# Useful, not needed: the build and the tests do without them.
# shellcheck disable=SC2034  # setup.sh reads it
wishes=(ccache)

# Program and Debian package of what the tests use where it is there; they are skipped where it is not.
# shellcheck disable=SC2034
test_wishes=("sbatch slurm-wlm" "munged munge" "ip iproute2")

# Folders a module or a user may have put headers into: X_ROOT, X_DIR, X_HOME, EBROOTX, CMAKE_PREFIX_PATH.
include_folders() {  # names
  local name variable
  for name in "$@"; do
    for variable in "${name}_ROOT" "${name}_DIR" "${name}_HOME" "EBROOT${name}"; do
      if [[ -n "${!variable:-}" ]]; then printf '%s/include\n' "${!variable}"; fi
    done
  done
  tr ':' '\n' <<<"${CMAKE_PREFIX_PATH:-}" | sed -n 's|.|&|p' | sed 's|$|/include|'
}

version_at_least() {  # have want
  [[ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" == "$2" ]]
}

# Prints what was found, or fails with `looked` saying how it was looked for.
probe() {  # how names
  local how=$1 names=$2 kind what want have folder
  IFS=: read -r kind what want <<<"$how"
  if [[ $kind == program ]]; then
    looked="program $what${want:+ $want or newer} in PATH"
    command -v "$what" >/dev/null || return 1
    [[ -n $want ]] || return 0
    have=$("$what" --version 2>/dev/null | grep -oE '[0-9]+\.[0-9]+(\.[0-9]+)?' | head -n 1)
    looked+=" (found $have)"
    version_at_least "${have:-0}" "$want"
    return
  fi
  local flags=()
  # shellcheck disable=SC2086  # several names, on purpose
  while read -r folder; do flags+=("-I$folder"); done < <(include_folders $names)
  # shellcheck disable=SC2086
  looked="header $what with ${CXX:-c++} -E, CPATH, pkg-config and the include folders of $(
    for name in $names; do printf '%s_ROOT %s_DIR %s_HOME EBROOT%s ' "$name" "$name" "$name" "$name"; done
  )CMAKE_PREFIX_PATH"
  if command -v pkg-config >/dev/null; then
    # shellcheck disable=SC2207
    flags+=($(pkg-config --cflags-only-I "$(basename "$what" .h)" 2>/dev/null || true))
  fi
  # Debian keeps serial HDF5 in a folder of its own that CMake knows.
  flags+=(-I/usr/include/hdf5/serial)
  printf '#if !__has_include(<%s>)\n#error missing\n#endif\n' "$what" |
    "${CXX:-c++}" "${flags[@]}" -E -x c++ - >/dev/null 2>&1
}

# Fills `missing` with the rows of `needs` that are not there. Installed Debian packages are taken on
# trust (one dpkg-query); for all others the compiler is asked.
find_missing() {
  local installed="" row package what how module names
  if command -v dpkg-query >/dev/null; then
    installed=$(dpkg-query -W -f='${db:Status-Abbrev}|${Package}\n' 2>/dev/null | sed -n 's/^ii *|//p')
  fi
  missing=()
  for row in "${needs[@]}"; do
    IFS='|' read -r package what how module names <<<"$row"
    grep -qx -- "$package" <<<"$installed" && continue
    probe "$how" "$names" || missing+=("$row|$looked")
  done
}

# One line each: name, how it was looked for, what to try.
tell_missing() {
  local row package what how module names looked first
  echo "setup: not found on this machine:" >&2
  for row in "${missing[@]}"; do
    IFS='|' read -r package what how module names looked <<<"$row"
    first=${names%% *}
    printf '  %s\n      looked for: %s\n      try: module load %s (module spider %s)%s; Debian and Ubuntu: %s\n' \
      "$what" "$looked" "$module" "$module" "${first:+, or set ${first}_ROOT and CMAKE_PREFIX_PATH}" \
      "$package" >&2
  done
}

# Installs Debian packages; refreshes apt's lists only where they do not know a package.
apt_install() {  # packages
  local run=() package
  if [[ $EUID -ne 0 ]]; then run=(sudo -n); fi
  for package in "$@"; do
    if ! apt-cache policy "$package" 2>/dev/null | grep -q 'Candidate: [^(]'; then
      "${run[@]}" apt-get update
      break
    fi
  done
  DEBIAN_FRONTEND=noninteractive "${run[@]}" apt-get install -y --no-install-recommends "$@" && return
  # A candidate that the mirror no longer has: the lists were old.
  "${run[@]}" apt-get update &&
    DEBIAN_FRONTEND=noninteractive "${run[@]}" apt-get install -y --no-install-recommends "$@"
}
