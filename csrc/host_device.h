// Marks functions that the host and the kernels share.
#pragma once

#if defined(__CUDACC__)
#define SPARSE_ATTN_HOST_DEVICE __host__ __device__
#else
#define SPARSE_ATTN_HOST_DEVICE
#endif

/// Also inlined always: what the CPU kernels of several instruction sets share must leave no
/// symbol.
#define SPARSE_ATTN_HOST_DEVICE_INLINE SPARSE_ATTN_HOST_DEVICE inline __attribute__((always_inline))
