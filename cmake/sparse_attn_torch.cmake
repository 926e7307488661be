# sparse_attn_find_torch([PYTHON]) makes the target sparse_attn::torch from a LibTorch folder or Python's torch package.
#
# It looks in SPARSE_ATTN_TORCH_ROOT, Torch_DIR, CMAKE_PREFIX_PATH, then asks PYTHON, and sets SPARSE_ATTN_TORCH_ROOT
# and SPARSE_ATTN_TORCH_VERSION (and SPARSE_ATTN_TORCH_HAS_CUDA for a CUDA build), or SPARSE_ATTN_TORCH_MESSAGE when there is none.
#
# Why not find_package(Torch): the TorchConfig.cmake of a CUDA build of torch ends the configuration where no CUDA toolkit is
# installed, and headers and three libraries are all that is needed. Both can be used in one project.

function(sparse_attn_find_torch)
  if(TARGET sparse_attn::torch)
    return()
  endif()
  set(roots ${SPARSE_ATTN_TORCH_ROOT})
  if(Torch_DIR)
    list(APPEND roots ${Torch_DIR}/../../..)
  endif()
  # torch.utils.cmake_prefix_path is <root>/share/cmake.
  foreach(prefix IN LISTS CMAKE_PREFIX_PATH)
    list(APPEND roots ${prefix} ${prefix}/../..)
  endforeach()
  if(ARGV0)
    execute_process(
      COMMAND ${ARGV0} -c "from importlib.util import find_spec
print(find_spec('torch').submodule_search_locations[0])"
      OUTPUT_VARIABLE from_python OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    list(APPEND roots ${from_python})
  endif()

  foreach(candidate IN LISTS roots)
    get_filename_component(root ${candidate} ABSOLUTE)
    set(version_header ${root}/include/torch/headeronly/version.h)
    if(EXISTS ${version_header})
      break()
    endif()
  endforeach()
  if(NOT EXISTS "${version_header}")
    set(SPARSE_ATTN_TORCH_MESSAGE
        "sparse_attn: no torch 2.11 or newer found; set SPARSE_ATTN_TORCH_ROOT to the folder of LibTorch or of \
Python's torch package, or CMAKE_PREFIX_PATH to torch.utils.cmake_prefix_path" PARENT_SCOPE)
    return()
  endif()

  file(STRINGS ${version_header} version REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
  string(REGEX REPLACE "[^0-9;]" "" version "${version}")
  string(REPLACE ";" "." version "${version}")
  set(libraries)
  foreach(name torch torch_cpu c10)
    list(APPEND libraries
         ${root}/lib/${CMAKE_SHARED_LIBRARY_PREFIX}${name}${CMAKE_SHARED_LIBRARY_SUFFIX})
  endforeach()
  add_library(sparse_attn::torch INTERFACE IMPORTED)
  set_target_properties(sparse_attn::torch PROPERTIES
    INTERFACE_COMPILE_FEATURES cxx_std_20 # torch's headers ask for it from 2.12 on
    INTERFACE_INCLUDE_DIRECTORIES "${root}/include;${root}/include/torch/csrc/api/include"
    INTERFACE_LINK_LIBRARIES "${libraries}")
  set(SPARSE_ATTN_TORCH_ROOT ${root} PARENT_SCOPE)
  set(SPARSE_ATTN_TORCH_VERSION ${version} PARENT_SCOPE)
  set(cuda_library ${root}/lib/${CMAKE_SHARED_LIBRARY_PREFIX}torch_cuda${CMAKE_SHARED_LIBRARY_SUFFIX})
  if(EXISTS ${cuda_library})
    set(SPARSE_ATTN_TORCH_HAS_CUDA ON PARENT_SCOPE)
  endif()
endfunction()
