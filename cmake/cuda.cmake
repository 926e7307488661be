# Whether and for which architectures the CUDA kernels are built: sets SPARSE_ATTN_WITH_CUDA and, with it, enables the language.
#
# AUTO builds them for a CUDA build of torch where there is a compiler. Architectures come from CMAKE_CUDA_ARCHITECTURES, else
# from TORCH_CUDA_ARCH_LIST in the environment ("8.0 9.0a"), else they are those of all devices that CUDA 13 knows: code for sm_75,
# sm_80 (which sm_86 and sm_89 run) and sm_90, and PTX for what comes after.

set(SPARSE_ATTN_CUDA AUTO CACHE STRING "Build the CUDA kernels: ON, OFF, or AUTO = for a CUDA build of torch, if there is nvcc")

set(hints $ENV{CUDACXX} $ENV{CUDA_HOME}/bin/nvcc $ENV{CUDA_PATH}/bin/nvcc)
foreach(hint IN LISTS hints)
  if(NOT CMAKE_CUDA_COMPILER AND EXISTS "${hint}")
    set(CMAKE_CUDA_COMPILER ${hint})
  endif()
endforeach()
find_program(SPARSE_ATTN_NVCC nvcc PATHS /usr/local/cuda/bin)
if(NOT CMAKE_CUDA_COMPILER AND SPARSE_ATTN_NVCC)
  set(CMAKE_CUDA_COMPILER ${SPARSE_ATTN_NVCC})
endif()

if(SPARSE_ATTN_CUDA STREQUAL "AUTO")
  set(SPARSE_ATTN_WITH_CUDA OFF)
  if(CMAKE_CUDA_COMPILER AND SPARSE_ATTN_TORCH_HAS_CUDA)
    set(SPARSE_ATTN_WITH_CUDA ON)
  endif()
else()
  set(SPARSE_ATTN_WITH_CUDA ${SPARSE_ATTN_CUDA})
endif()

if(SPARSE_ATTN_WITH_CUDA)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    string(REPLACE "." "" wanted "$ENV{TORCH_CUDA_ARCH_LIST}")
    string(REGEX MATCHALL "[0-9]+[af]?" CMAKE_CUDA_ARCHITECTURES "${wanted}")
    if(NOT CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 90-real 90-virtual)
    endif()
  endif()
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
endif()
