# Compiles the lengths of data/openorca_lengths.csv in, so that an installed drover needs no file.
set(csv ${CMAKE_CURRENT_SOURCE_DIR}/data/openorca_lengths.csv)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${csv})
file(STRINGS ${csv} rows REGEX "^[0-9]+,[0-9]+$")
list(LENGTH rows count)
if(count EQUAL 0)
  message(FATAL_ERROR "${csv} holds no rows of input_tokens,output_tokens")
endif()
list(TRANSFORM rows REPLACE "^([0-9]+),([0-9]+)$" "    {\\1, \\2},")
list(JOIN rows "\n" rows)
file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/generated/drover_openorca_lengths.h
     CONTENT "// Made from data/openorca_lengths.csv by CMake.
#pragma once

namespace drover {

struct SampleLengths {
  int input, output;  // tokens
};
inline constexpr SampleLengths kOpenOrcaLengths[] = {
@rows@
};

}  // namespace drover
" @ONLY)
