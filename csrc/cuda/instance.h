// The name of what a source makes for its storage type and head size, which CMakeLists.txt sets.
#pragma once

#define SPARSE_ATTN_NAME3(path, scalar, size) path##_##scalar##_##size
#define SPARSE_ATTN_NAME2(path, scalar, size) SPARSE_ATTN_NAME3(path, scalar, size)
/// mma_bfloat16_64, for instance.
#define SPARSE_ATTN_NAME(path) SPARSE_ATTN_NAME2(path, SPARSE_ATTN_SCALAR, SPARSE_ATTN_HEAD_SIZE)
