# Target drover_version: writes generated/drover_version.h. Include it as "drover_version.h".
find_package(Git QUIET)
set(version_folder "${CMAKE_BINARY_DIR}/generated")
add_custom_target(drover_version
  COMMAND "${CMAKE_COMMAND}" "-DSOURCE=${CMAKE_SOURCE_DIR}" "-DGIT=${GIT_EXECUTABLE}"
    "-DHEADER=${version_folder}/drover_version.h" "-DDROVER_VERSION=${PROJECT_VERSION}"
    "-DDROVER_LOADGEN_VERSION=${DROVER_LOADGEN_VERSION}" "-DDROVER_BUILD_TYPE=${CMAKE_BUILD_TYPE}"
    "-DDROVER_COMPILER=${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
    "-DDROVER_SANITIZE=${DROVER_SANITIZE}"
    -P "${CMAKE_SOURCE_DIR}/cmake/version.cmake"
  BYPRODUCTS "${version_folder}/drover_version.h"
  COMMENT "Looking up the commit for drover_version.h" VERBATIM)
target_include_directories(drover_flags INTERFACE "${version_folder}")
if(TARGET drover_base)
  # Through base every room waits for the header before it compiles.
  add_dependencies(drover_base drover_version)
endif()
