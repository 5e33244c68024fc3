# Tests that need a GPU, label gpu; reported as skipped where there is none. tests/gpu.sh runs the
# same programs elsewhere: `programs.txt` tells it their names and ranks.
set(gpu_list "")
# RANKS: 0 without mpirun.
function(drover_gpu_test name ranks)
  set(command ${name})
  if(ranks GREATER 0)
    set(command ${CMAKE_CURRENT_SOURCE_DIR}/mpi/mpirun.sh ${ranks} $<TARGET_FILE:${name}>)
  endif()
  set(test ${name})
  if(ranks GREATER 0)
    string(APPEND test _${ranks}_ranks)
  endif()
  add_test(NAME ${test} COMMAND ${command})
  set_tests_properties(${test} PROPERTIES LABELS gpu TIMEOUT 300 RUN_SERIAL ON
    SKIP_REGULAR_EXPRESSION "no GPU here|GPUs are needed")
  set(gpu_list "${gpu_list}${name} ${ranks}\n" PARENT_SCOPE)
endfunction()
function(drover_gpu_program name)
  add_executable(${name} ${ARGN})
  target_include_directories(${name} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
  set_target_properties(${name} PROPERTIES INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR}")
  target_link_options(${name} PRIVATE -Wl,--as-needed)
  install(TARGETS ${name} RUNTIME DESTINATION tests COMPONENT tests EXCLUDE_FROM_ALL)
endfunction()

# The operation tests once more, over the CUDA backend: tests/gpu/ops/*.h stand in for those of
# tests/ops.
foreach(f ${ops})
  get_filename_component(name ${f} NAME_WE)
  drover_gpu_program(gpu_${name} ${f})
  target_include_directories(gpu_${name} BEFORE PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/gpu)
  target_link_libraries(gpu_${name} PRIVATE drover_backend_cuda GTest::gtest GTest::gtest_main)
  drover_gpu_test(gpu_${name} 0)
endforeach()
# Every tests/gpu/X_test.cc: what the CUDA backend has beside the operations.
file(GLOB gpu CONFIGURE_DEPENDS gpu/*_test.cc)
foreach(f ${gpu})
  get_filename_component(name ${f} NAME_WE)
  drover_gpu_program(gpu_${name} ${f})
  target_link_libraries(gpu_${name} PRIVATE drover_backend_cuda drover_model GTest::gtest
                        GTest::gtest_main)
  drover_gpu_test(gpu_${name} 0)
endforeach()
# Every tests/gpu/mpi/X_test.cc: communicators between GPUs, and operations over them, with a main
# of its own.
file(GLOB gpu CONFIGURE_DEPENDS gpu/mpi/*_test.cc)
foreach(f ${gpu})
  get_filename_component(name ${f} NAME_WE)
  drover_gpu_program(gpu_${name} ${f})
  target_link_libraries(gpu_${name} PRIVATE drover_comm drover_backend_cuda GTest::gtest)
  drover_gpu_test(gpu_${name} 1)
  drover_gpu_test(gpu_${name} 2)
endforeach()

# Not run by ctest.
file(GLOB benches CONFIGURE_DEPENDS bench/cuda_*.cc bench/hopper_*.cu)
foreach(f ${benches})
  get_filename_component(name ${f} NAME_WE)
  drover_gpu_program(${name} ${f})
  target_link_libraries(${name} PRIVATE drover_backend_cuda)
  if(name MATCHES "^hopper_")
    set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES 90a)
  endif()
endforeach()

file(GENERATE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/programs.txt CONTENT "${gpu_list}")
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/programs.txt DESTINATION tests COMPONENT tests
  EXCLUDE_FROM_ALL)
