# Run by the build (cmake -P): the commit may change without CMake being configured again.
# configure_file leaves the header alone when nothing in it changed, so nothing is rebuilt for it.
set(DROVER_COMMIT "unknown")
if(GIT AND EXISTS "${SOURCE}/.git")
  execute_process(COMMAND "${GIT}" -C "${SOURCE}" rev-parse --short=12 HEAD
    OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE bad ERROR_QUIET)
  if(NOT bad)
    set(DROVER_COMMIT "${commit}")
    execute_process(COMMAND "${GIT}" -C "${SOURCE}" diff --quiet HEAD -- src cmake CMakeLists.txt
      RESULT_VARIABLE changed OUTPUT_QUIET ERROR_QUIET)
    if(changed)
      string(APPEND DROVER_COMMIT "-modified")
    endif()
  endif()
endif()
configure_file("${SOURCE}/cmake/version.h.in" "${HEADER}" @ONLY)
