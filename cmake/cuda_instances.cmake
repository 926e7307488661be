# sparse_attn_add_cuda(<library> LANGUAGE <CUDA|CXX> [SOURCES <device.cu or its stand-in>]) makes a static library of the CUDA
# kernels: one text, compiled once for each storage type, and for the tensor cores once for each head size as well. As CXX it is
# what the emulator of tests/native runs.

set(SPARSE_ATTN_HEAD_SIZES 32 64 96 128 192 256 CACHE STRING
    "Head sizes of the tensor-core kernels; what lies between takes the next, what lies beyond the portable kernels")
set(SPARSE_ATTN_TENSOR_CORE_SCALARS bfloat16 float16 float32 CACHE STRING
    "Storage types of the tensor-core kernels; float32 stands for TF32")
set(SPARSE_ATTN_SM90_HEAD_SIZES 64 128) # of the kernels for sm_90a, as far as SPARSE_ATTN_HEAD_SIZES has them
set(SPARSE_ATTN_LARGEST_TF32_HEAD 128) # beyond, the tiles do not fit shared memory: see csrc/cuda/config.h

function(sparse_attn_add_cuda library)
  cmake_parse_arguments(arg "" "LANGUAGE" "SOURCES" ${ARGN})
  set(root ${sparse_attn_SOURCE_DIR}/csrc/cuda)
  set_source_files_properties(${root}/simt.cu ${root}/simt_along.cu ${root}/mma.cu ${root}/sm90.cu ${root}/evaluate.cu ${root}/linear.cu
                              ${root}/selection.cu PROPERTIES LANGUAGE ${arg_LANGUAGE})
  add_library(${library} STATIC ${root}/run.cpp ${root}/tables.cpp ${root}/dispatch.cpp ${root}/evaluate.cu ${root}/selection.cu
              ${arg_SOURCES})
  set(parts ${library})
  foreach(scalar float32 float64 bfloat16 float16)
    sparse_attn_add_cuda_part(${library}_simt_${scalar} simt.cu ${scalar})
    sparse_attn_add_cuda_part(${library}_simt_along_${scalar} simt_along.cu ${scalar})
    sparse_attn_add_cuda_part(${library}_linear_${scalar} linear.cu ${scalar})
  endforeach()
  set(instances)
  set(tensor_core_scalars ${SPARSE_ATTN_TENSOR_CORE_SCALARS})
  set(first_tensor_cores 80) # ldmatrix of bfloat16, cp.async and mma of these shapes begin with sm_80
  if(arg_LANGUAGE STREQUAL "CUDA")
    set(tensor_core_archs ${CMAKE_CUDA_ARCHITECTURES})
    list(FILTER tensor_core_archs EXCLUDE REGEX "^7")
    if(NOT tensor_core_archs)
      set(tensor_core_scalars)
    elseif(tensor_core_archs MATCHES "^[0-9]")
      list(SORT tensor_core_archs COMPARE NATURAL)
      string(REGEX MATCH "^[0-9]+" first_tensor_cores "${tensor_core_archs}")
    endif()
  endif()
  foreach(scalar IN LISTS tensor_core_scalars)
    foreach(size IN LISTS SPARSE_ATTN_HEAD_SIZES)
      if(scalar STREQUAL "float32" AND size GREATER SPARSE_ATTN_LARGEST_TF32_HEAD)
        continue()
      endif()
      sparse_attn_add_cuda_part(${library}_mma_${scalar}_${size} mma.cu ${scalar} ${size})
      string(APPEND instances "X(${scalar}, ${size}) ")
    endforeach()
  endforeach()
  set(sm90_instances)
  # Code for sm_90a runs on devices of sm_90 and on no other.
  if(arg_LANGUAGE STREQUAL "CXX" OR CMAKE_CUDA_ARCHITECTURES MATCHES "(^|;)90")
    set(tensor_core_archs 90a-real)
    foreach(scalar bfloat16 float16)
      foreach(size IN LISTS SPARSE_ATTN_SM90_HEAD_SIZES)
        if(scalar IN_LIST SPARSE_ATTN_TENSOR_CORE_SCALARS AND size IN_LIST SPARSE_ATTN_HEAD_SIZES)
          sparse_attn_add_cuda_part(${library}_sm90_${scalar}_${size} sm90.cu ${scalar} ${size})
          string(APPEND sm90_instances "X(${scalar}, ${size}) ")
        endif()
      endforeach()
    endforeach()
  endif()
  if(arg_LANGUAGE STREQUAL "CXX")
    set(includes ${sparse_attn_SOURCE_DIR}/tests/native/emulator) # its cuda/ptx.cuh comes before ours
  endif()
  foreach(part IN LISTS parts)
    target_include_directories(${part} PRIVATE ${includes} ${sparse_attn_SOURCE_DIR}/csrc)
    target_compile_features(${part} PRIVATE cxx_std_17)
    target_compile_options(${part} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wno-unknown-pragmas>)
    target_link_libraries(${part} PRIVATE $<BUILD_INTERFACE:sparse_attn_options>)
  endforeach()
  set_source_files_properties(${root}/dispatch.cpp PROPERTIES
                              COMPILE_DEFINITIONS "SPARSE_ATTN_MMA_INSTANCES=${instances};SPARSE_ATTN_SM90_INSTANCES=${sm90_instances};SPARSE_ATTN_FIRST_TENSOR_CORES=${first_tensor_cores}")
  target_link_libraries(${library} PUBLIC sparse_attn_core)
endfunction()

macro(sparse_attn_add_cuda_part part source scalar)
  add_library(${part} OBJECT ${root}/${source})
  target_compile_definitions(${part} PRIVATE SPARSE_ATTN_SCALAR=${scalar})
  if(${ARGC} GREATER 3)
    target_compile_definitions(${part} PRIVATE SPARSE_ATTN_HEAD_SIZE=${ARGV3})
    if(arg_LANGUAGE STREQUAL "CUDA")
      set_target_properties(${part} PROPERTIES CUDA_ARCHITECTURES "${tensor_core_archs}")
    endif()
  endif()
  target_sources(${library} PRIVATE $<TARGET_OBJECTS:${part}>)
  list(APPEND parts ${part})
endmacro()

# The same on the emulator.
function(sparse_attn_add_emulated_cuda library)
  sparse_attn_add_cuda(${library} LANGUAGE CXX
                       SOURCES ${sparse_attn_SOURCE_DIR}/tests/native/emulator/device.cpp
                               ${sparse_attn_SOURCE_DIR}/tests/native/emulator/tensor_map.cpp)
endfunction()
