# The instruction sets that the CPU kernels are compiled for, best first, and their compiler flags.
# Sets SPARSE_ATTN_ISAS (cache), SPARSE_ATTN_FLAGS_<isa> and SPARSE_ATTN_KERNEL_FLAGS.

if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(oldest_compiler 11) # the first with -march=x86-64-v4 and a usable C++20, which torch's headers ask for
elseif(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  set(oldest_compiler 13)
else()
  message(FATAL_ERROR "sparse_attn: expected GCC or Clang (the kernels use their vector extensions), "
                      "got ${CMAKE_CXX_COMPILER_ID}")
endif()
if(CMAKE_CXX_COMPILER_VERSION VERSION_LESS ${oldest_compiler})
  message(FATAL_ERROR "sparse_attn: expected ${CMAKE_CXX_COMPILER_ID} ${oldest_compiler} or newer, got "
                      "${CMAKE_CXX_COMPILER_VERSION} (${CMAKE_CXX_COMPILER}); set CXX to another one")
endif()

# Of this one only bfloat16 has kernels of its own; the others are those of x86_64_v4.
set(SPARSE_ATTN_FLAGS_x86_64_amx -march=x86-64-v4 -mamx-tile -mamx-bf16 -mavx512bf16)
set(SPARSE_ATTN_FLAGS_x86_64_v4 -march=x86-64-v4)
set(SPARSE_ATTN_FLAGS_x86_64_v3 -march=x86-64-v3)
set(SPARSE_ATTN_FLAGS_x86_64_v2 -march=x86-64-v2)
set(SPARSE_ATTN_FLAGS_aarch64_neon -march=armv8-a)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(isas x86_64_amx x86_64_v4 x86_64_v3 x86_64_v2)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(isas aarch64_neon)
else()
  message(FATAL_ERROR "sparse_attn: expected an x86-64 or aarch64 processor, got "
                      "'${CMAKE_SYSTEM_PROCESSOR}'")
endif()
set(SPARSE_ATTN_ISAS "${isas}" CACHE STRING "Instruction sets to compile the CPU kernels for, best first")
foreach(isa IN LISTS SPARSE_ATTN_ISAS)
  if(NOT isa IN_LIST isas)
    message(FATAL_ERROR "sparse_attn: expected SPARSE_ATTN_ISAS to be some of '${isas}', got '${isa}'")
  endif()
endforeach()
if("x86_64_amx" IN_LIST SPARSE_ATTN_ISAS AND NOT "x86_64_v4" IN_LIST SPARSE_ATTN_ISAS)
  message(FATAL_ERROR "sparse_attn: expected x86_64_v4 in SPARSE_ATTN_ISAS beside x86_64_amx")
endif()

# -Wno-psabi: GCC's note that passing wide vectors differs between versions; here they never cross a file.
set(SPARSE_ATTN_KERNEL_FLAGS -fno-math-errno -ffp-contract=fast -fno-semantic-interposition -Wno-psabi)
if(SPARSE_ATTN_SANITIZE) # -O3 with sanitizers: 367 s for one file, -O1: 43 s
  list(APPEND SPARSE_ATTN_KERNEL_FLAGS -O1)
else()
  list(APPEND SPARSE_ATTN_KERNEL_FLAGS -O3)
endif()
