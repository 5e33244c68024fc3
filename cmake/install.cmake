# A tree that runs from where it is put: bin/drover finds libraries beside itself first, and the
# launch scripts find bin/drover from their own place.
include(GNUInstallDirs)
set(drover_share "${CMAKE_INSTALL_DATADIR}/drover")
if(TARGET drover)
  set_target_properties(drover PROPERTIES INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR}")
  install(TARGETS drover RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
endif()
install(DIRECTORY data launch topology slurm DESTINATION "${drover_share}" USE_SOURCE_PERMISSIONS
  PATTERN "__pycache__" EXCLUDE PATTERN "*.pyc" EXCLUDE PATTERN ".pytest_cache" EXCLUDE)
