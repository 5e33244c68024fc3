# MLPerf's official LoadGen as a library.
set(DROVER_LOADGEN_DIR "${CMAKE_SOURCE_DIR}/build/deps/mlcommons_loadgen-6.0.17" CACHE PATH
  "LoadGen's source folder, unmodified")
add_library(loadgen STATIC
  ${DROVER_LOADGEN_DIR}/early_stopping.cc ${DROVER_LOADGEN_DIR}/issue_query_controller.cc
  ${DROVER_LOADGEN_DIR}/loadgen.cc ${DROVER_LOADGEN_DIR}/logging.cc
  ${DROVER_LOADGEN_DIR}/results.cc ${DROVER_LOADGEN_DIR}/test_settings_internal.cc
  ${DROVER_LOADGEN_DIR}/utils.cc ${DROVER_LOADGEN_DIR}/version.cc
  ${DROVER_LOADGEN_DIR}/generated/version_generated.cc)
target_include_directories(loadgen SYSTEM PUBLIC ${DROVER_LOADGEN_DIR})
target_compile_options(loadgen PRIVATE -w)
target_link_libraries(loadgen PUBLIC Threads::Threads)
