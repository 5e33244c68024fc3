# Tests that are not C++ programs: the data tools (pytest), the lints, the installed tree.
find_program(DROVER_PYTHON NAMES python python3 PATHS "${CMAKE_SOURCE_DIR}/build/venv/bin"
  NO_DEFAULT_PATH)
if(NOT DROVER_PYTHON)
  message(STATUS "No build/venv: the data tools' tests are left out (launch/setup.sh --tests makes it)")
else()
  add_test(NAME data_tools WORKING_DIRECTORY "${CMAKE_SOURCE_DIR}"
    COMMAND "${DROVER_PYTHON}" -m pytest -q -p no:cacheprovider tests/data)
  set_tests_properties(data_tools PROPERTIES LABELS fast TIMEOUT 300)
  add_test(NAME lint_rooms COMMAND "${DROVER_PYTHON}"
    "${CMAKE_CURRENT_SOURCE_DIR}/lint/check_rooms.py" --self-test)
  set_tests_properties(lint_rooms PROPERTIES LABELS fast TIMEOUT 60)
endif()
option(DROVER_CHECK_FORMAT "clang-format 14 over the sources is a test" OFF)
set(lints shell)
if(DROVER_CHECK_FORMAT)
  list(APPEND lints format)
endif()
foreach(lint ${lints})
  add_test(NAME lint_${lint} COMMAND "${CMAKE_CURRENT_SOURCE_DIR}/lint/${lint}.sh")
  set_tests_properties(lint_${lint} PROPERTIES LABELS fast TIMEOUT 120 SKIP_RETURN_CODE 77)
endforeach()
add_test(NAME launch_scripts COMMAND "${CMAKE_CURRENT_SOURCE_DIR}/e2e/launch_test.sh" "${CMAKE_BINARY_DIR}")
set_tests_properties(launch_scripts PROPERTIES LABELS fast TIMEOUT 120)
if(TARGET drover)
  add_test(NAME install_tree
    COMMAND "${CMAKE_CURRENT_SOURCE_DIR}/e2e/install_test.sh" "${CMAKE_COMMAND}" "${CMAKE_BINARY_DIR}")
  set_tests_properties(install_tree PROPERTIES LABELS e2e TIMEOUT 120)
endif()
