# CUTLASS headers: CUTLASS_HOME if set, else the Python package nvidia-cutlass. CX_CUTLASS_INCLUDE is empty if neither
# has them.
set(CX_CUTLASS_INCLUDE "")
set(CX_CUTLASS_VERSION "")
if(DEFINED ENV{CUTLASS_HOME})
  set(cutlass_include "$ENV{CUTLASS_HOME}/include")
else()
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import importlib.util, os; print(os.path.dirname(importlib.util.find_spec('cutlass_library').origin))"
    OUTPUT_VARIABLE cutlass_library
    OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_QUIET)
  set(cutlass_include "${cutlass_library}/source/include")
endif()
if(EXISTS "${cutlass_include}/cutlass/version.h")
  set(CX_CUTLASS_INCLUDE "${cutlass_include}")
  foreach(part MAJOR MINOR PATCH)
    file(STRINGS "${cutlass_include}/cutlass/version.h" line REGEX "#define CUTLASS_${part} ")
    string(REGEX REPLACE "[^0-9]*([0-9]+).*" "\\1" number "${line}")
    list(APPEND CX_CUTLASS_VERSION ${number})
  endforeach()
  list(JOIN CX_CUTLASS_VERSION "." CX_CUTLASS_VERSION)
endif()
