# The operation tests once more, over the CUDA backend: tests/gpu/ops/*.h stand in for those of
# tests/ops. Label gpu; skipped where there is no GPU.
foreach(f ${ops})
  get_filename_component(name ${f} NAME_WE)
  add_executable(gpu_${name} ${f})
  target_include_directories(gpu_${name} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/gpu
                             ${CMAKE_CURRENT_SOURCE_DIR})
  target_link_libraries(gpu_${name} PRIVATE drover_backend_cuda GTest::gtest GTest::gtest_main)
  add_test(NAME gpu_${name} COMMAND gpu_${name})
  set_tests_properties(gpu_${name} PROPERTIES LABELS gpu TIMEOUT 300 RUN_SERIAL ON
    SKIP_REGULAR_EXPRESSION "no GPU here")
endforeach()
add_executable(cuda_ops_bench bench/cuda_ops_bench.cc)
target_link_libraries(cuda_ops_bench PRIVATE drover_backend_cuda)
# Every tests/gpu/X_test.cc: what the CUDA backend has beside the operations.
file(GLOB gpu CONFIGURE_DEPENDS gpu/*_test.cc)
foreach(f ${gpu})
  drover_test(${f} gpu drover_backend_cuda drover_model)
  get_filename_component(name ${f} NAME_WE)
  set_tests_properties(${name} PROPERTIES TIMEOUT 300 RUN_SERIAL ON
    SKIP_REGULAR_EXPRESSION "no GPU here")
endforeach()
