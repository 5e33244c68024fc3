# -DDROVER_SANITIZE=address,undefined or thread: for everything in the build, LoadGen too.
set(DROVER_SANITIZE "" CACHE STRING "Sanitizers, as -fsanitize takes them")
if(DROVER_SANITIZE)
  add_compile_options(-fsanitize=${DROVER_SANITIZE} -fno-omit-frame-pointer -g)
  add_link_options(-fsanitize=${DROVER_SANITIZE})
  if(DROVER_SANITIZE MATCHES "undefined")
    add_compile_options(-fno-sanitize-recover=undefined)
  endif()
endif()
