// Marks functions that the host and the kernels share.
#pragma once

#if defined(__CUDACC__)
#define SPARSE_ATTN_HOST_DEVICE __host__ __device__
#else
#define SPARSE_ATTN_HOST_DEVICE
#endif
