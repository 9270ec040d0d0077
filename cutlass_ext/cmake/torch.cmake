# Headers and libraries of the torch that is installed for Python. TorchConfig.cmake is not used: it would bring in
# CUDA and ABI flags, and the stable ABI needs neither.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import importlib.util, os; print(os.path.dirname(importlib.util.find_spec('torch').origin))"
  OUTPUT_VARIABLE torch_dir
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE torch_missing
  ERROR_QUIET)
if(torch_missing)
  message(FATAL_ERROR "torch: expected an installed torch >= 2.11 for ${Python_EXECUTABLE}, got none; -DCX_TORCH=OFF builds "
                      "the library without the torch operators")
endif()
set(CX_TORCH_INCLUDE "${torch_dir}/include")
set(CX_TORCH_LIB "${torch_dir}/lib")
