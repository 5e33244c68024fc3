# MLPerf's official LoadGen as a library: the source package mlcommons-loadgen, unmodified.
# It keeps its compiled-in mlperf.conf (mlperf_conf.h) and the version file made at release, so that
# its logs carry the git revision of the tag and no "uncommitted changes".
set(DROVER_LOADGEN_DIR "${CMAKE_SOURCE_DIR}/build/deps/mlcommons_loadgen-6.0.17" CACHE PATH
  "LoadGen's source folder, unmodified: the unpacked source package, or loadgen/ of a tagged checkout")

set(loadgen_compiled early_stopping.cc issue_query_controller.cc loadgen.cc logging.cc results.cc
  test_settings_internal.cc utils.cc version.cc)
foreach(file ${loadgen_compiled} loadgen.h VERSION.txt)
  if(NOT EXISTS "${DROVER_LOADGEN_DIR}/${file}")
    message(FATAL_ERROR "LoadGen's source is not there: ${DROVER_LOADGEN_DIR}/${file} is missing. "
      "Run launch/setup.sh, which fetches it, or name another source folder with "
      "-DDROVER_LOADGEN_DIR=DIR.")
  endif()
endforeach()
file(STRINGS "${DROVER_LOADGEN_DIR}/VERSION.txt" DROVER_LOADGEN_VERSION LIMIT_COUNT 1)

set(loadgen_include "${DROVER_LOADGEN_DIR}")
set(loadgen_version_file "${DROVER_LOADGEN_DIR}/generated/version_generated.cc")
if(EXISTS "${loadgen_version_file}" AND EXISTS "${DROVER_LOADGEN_DIR}/mlperf_conf.h")
  # The version file lists the SHA-1 of every file at the tag: hold what is compiled against it.
  file(READ "${loadgen_version_file}" loadgen_listing)
  foreach(file ${loadgen_compiled} mlperf_conf.h loadgen.h logging.h query_sample.h
      query_sample_library.h system_under_test.h test_settings.h results.h)
    file(SHA1 "${DROVER_LOADGEN_DIR}/${file}" sha1)
    string(FIND "${loadgen_listing}" "${sha1} /${file}" place)
    if(place EQUAL -1)
      message(FATAL_ERROR "${DROVER_LOADGEN_DIR}/${file} is not the released file (SHA-1 ${sha1} "
        "is not in generated/version_generated.cc). MLPerf wants LoadGen unmodified. "
        "Run launch/setup.sh, which puts the released files back.")
    endif()
  endforeach()
else()
  # A checkout: its own generator writes the version, from git, and setup.py's rule the conf header.
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  set(loadgen_include "${CMAKE_BINARY_DIR}/generated/loadgen")
  set(loadgen_version_file "${loadgen_include}/version_generated.cc")
  file(MAKE_DIRECTORY "${loadgen_include}")
  execute_process(
    COMMAND "${Python3_EXECUTABLE}" version_generator.py "${loadgen_version_file}" .
    WORKING_DIRECTORY "${DROVER_LOADGEN_DIR}" RESULT_VARIABLE loadgen_generated)
  if(NOT loadgen_generated EQUAL 0 OR NOT EXISTS "${DROVER_LOADGEN_DIR}/mlperf.conf")
    message(FATAL_ERROR "${DROVER_LOADGEN_DIR} has neither generated/version_generated.cc nor a "
      "version_generator.py and mlperf.conf to make it from. DROVER_LOADGEN_DIR wants the unpacked "
      "source package or the loadgen folder of a tagged checkout.")
  endif()
  file(READ "${DROVER_LOADGEN_DIR}/mlperf.conf" conf)
  string(REPLACE "\\" "\\\\" conf "${conf}")
  string(REPLACE "\"" "\\\"" conf "${conf}")
  string(REPLACE "\n" "\\n\"\n\"" conf "${conf}")
  file(WRITE "${loadgen_include}/mlperf_conf.h" "const char* mlperf_conf =\n\"${conf}\";\n")
endif()

list(TRANSFORM loadgen_compiled PREPEND "${DROVER_LOADGEN_DIR}/")
add_library(loadgen STATIC ${loadgen_compiled} "${loadgen_version_file}")
target_include_directories(loadgen SYSTEM PUBLIC "${DROVER_LOADGEN_DIR}" PRIVATE "${loadgen_include}")
# LoadGen reads a reserved but empty vector in Offline token runs (logging.cc, time_per_output_token_):
# harmless, but libstdc++'s assertions abort on it. GCC from 15 on turns them on wherever it does not
# optimize, so both names are needed. For the same line UBSan is left out (its arithmetic runs on
# values nobody uses); address and thread checks stay.
target_compile_options(loadgen PRIVATE -w -U_GLIBCXX_ASSERTIONS -D_GLIBCXX_NO_ASSERTIONS
  -fno-sanitize=undefined)
target_link_libraries(loadgen PUBLIC Threads::Threads)
