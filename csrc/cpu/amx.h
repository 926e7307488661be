// bfloat16 on AMX: products of tiles of 16 rows of 64 bytes, and what brings matrices into the
// shape that they take. For files compiled with -mamx-tile -mamx-bf16 -mavx512bf16.
//
// C (+)= A B: a row of A has 32 bfloat16 along the sum; a row of B has 16 columns of two that
// follow each other along the sum ("pairs"); C is float32. Subnormal bfloat16 count as zero.
#pragma once

#include <immintrin.h>

#include "tile.h"

namespace {

/// Rows and columns of a tile of C, and how far a tile of A or B reaches along the sum.
constexpr int kAmxRows = 16, kAmxSum = 32;
/// Columns of a block of tiles of C.
constexpr int kAmxColumns = 2;

/// What LDTILECFG reads: here eight whole tiles.
struct alignas(64) AmxConfig {
  constexpr AmxConfig() {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = 64;
      rows[i] = kAmxRows;
    }
  }
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

/// The tile registers of this thread are in use as long as this lives.
class AmxTiles {
 public:
  AmxTiles() {
    static constexpr AmxConfig kConfig;
    _tile_loadconfig(&kConfig);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

/// An operand in memory, `stride` elements from row to row; of B an element is half of a pair.
using AmxRows = Rows<BFloat16>;

struct AmxSums {
  float* data;
  int64_t stride;
};

/// One or two tiles of rows by one or two of columns. The compiler does not know what the tile
/// instructions read, hence the barriers in amx_product.
template <bool kAdds, bool kTwoRows, bool kTwoColumns>
SPARSE_ATTN_INLINE void amx_block(AmxRows a, AmxRows b, int sum_tiles, AmxSums c) {
  const int64_t a_bytes = a.stride * 2, b_bytes = b.stride * 2, c_bytes = c.stride * 4;
  float* const below = c.data + kAmxRows * c.stride;
  if constexpr (kAdds) {
    _tile_loadd(0, c.data, c_bytes);
    if constexpr (kTwoColumns) _tile_loadd(1, c.data + kAmxRows, c_bytes);
    if constexpr (kTwoRows) _tile_loadd(2, below, c_bytes);
    if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, below + kAmxRows, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kTwoColumns) _tile_zero(1);
    if constexpr (kTwoRows) _tile_zero(2);
    if constexpr (kTwoRows && kTwoColumns) _tile_zero(3);
  }
  for (int k = 0; k < sum_tiles; ++k) {
    _tile_loadd(4, a.data, a_bytes);
    _tile_loadd(6, b.data, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoColumns) {
      _tile_loadd(7, b.data + 2 * kAmxRows, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoRows) {
      _tile_loadd(5, a.data + kAmxRows * a.stride, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kTwoRows && kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    a.data += kAmxSum;
    b.data += kAmxSum / 2 * b.stride;
  }
  _tile_stored(0, c.data, c_bytes);
  if constexpr (kTwoColumns) _tile_stored(1, c.data + kAmxRows, c_bytes);
  if constexpr (kTwoRows) _tile_stored(2, below, c_bytes);
  if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, below + kAmxRows, c_bytes);
}

template <bool kAdds, bool kTwoRows>
SPARSE_ATTN_INLINE void amx_row(int columns, AmxRows a, AmxRows b, int sum_tiles, AmxSums c) {
  int n = 0;
  for (; n + 2 <= columns; n += 2) {
    amx_block<kAdds, kTwoRows, true>(a, {b.data + n * kAmxSum, b.stride}, sum_tiles,
                                     {c.data + n * kAmxRows, c.stride});
  }
  if (n < columns) {
    amx_block<kAdds, kTwoRows, false>(a, {b.data + n * kAmxSum, b.stride}, sum_tiles,
                                      {c.data + n * kAmxRows, c.stride});
  }
}

/// C = A B, or C += A B; sizes are in tiles.
template <bool kAdds>
__attribute__((noinline)) void amx_product(int rows, int columns, int sum_tiles, AmxRows a,
                                           AmxRows b, AmxSums c) {
  asm volatile("" ::: "memory");
  int m = 0;
  for (; m + 2 <= rows; m += 2) {
    amx_row<kAdds, true>(columns, {a.row(m * kAmxRows), a.stride}, b, sum_tiles,
                         {c.data + m * kAmxRows * c.stride, c.stride});
  }
  if (m < rows) {
    amx_row<kAdds, false>(columns, {a.row(m * kAmxRows), a.stride}, b, sum_tiles,
                          {c.data + m * kAmxRows * c.stride, c.stride});
  }
  asm volatile("" ::: "memory");
}

SPARSE_ATTN_INLINE void store_words(BFloat16* to, __m512i words) { _mm512_storeu_si512(to, words); }

/// Copies the rows of a tile, each padded with zeros to `padded` elements; rows whose bit in `live`
/// is clear, and those up to `rows`, become zeros.
SPARSE_ATTN_INLINE void copy_rows(BFloat16* to, Head<const BFloat16> head, const Tile& tile,
                                  const int64_t* list, int size, uint64_t live, int rows) {
  const int padded = round_up(size, kAmxSum);
  for (int i = 0; i < rows; ++i) {
    const bool counts = i < tile.count && (live >> i & 1);
    const BFloat16* from = counts ? head.row(tile, list, i) : head.data;
    for (int c = 0; c < padded; c += kAmxSum) {
      const int left = counts ? size - c : 0;
      const __mmask32 part = left >= kAmxSum ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
      store_words(to + i * padded + c, _mm512_maskz_loadu_epi16(part, from + c));
    }
  }
}

/// to[r / 2][c] is the pair of rows r and r + 1 in column c.
SPARSE_ATTN_INLINE void pair_rows(BFloat16* to, const BFloat16* from, int columns, int rows) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(kFirst),
                second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (int r = 0; r < rows; r += 2) {
    for (int c = 0; c < columns; c += kAmxSum) {
      const __m512i a = _mm512_loadu_si512(from + r * columns + c),
                    b = _mm512_loadu_si512(from + (r + 1) * columns + c);
      BFloat16* at = to + r * columns + 2 * c;
      store_words(at, _mm512_permutex2var_epi16(a, first, b));
      store_words(at + kAmxSum, _mm512_permutex2var_epi16(a, second, b));
    }
  }
}

/// to[c][r] = from[r][c], each element two bfloat16; both sizes are multiples of 16, `from` is
/// contiguous.
inline void transpose_pairs(BFloat16* to, int64_t to_stride, const BFloat16* from, int rows,
                            int columns) {
  for (int r = 0; r < rows; r += kAmxRows) {
    for (int c = 0; c < columns; c += kAmxRows) {
      Vec<float> block[kAmxRows];  // moved only: as numbers, some would be flushed to zero
#pragma GCC unroll 16
      for (int i = 0; i < kAmxRows; ++i)
        block[i] = load(reinterpret_cast<const float*>(from + 2 * ((r + i) * columns + c)));
      transpose_block<float>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kAmxRows; ++i)
        store(reinterpret_cast<float*>(to + 2 * ((c + i) * to_stride + r)), block[i]);
    }
  }
}

/// Operands B for all queries of a tile lie one block of columns after the other: in rows of
/// kMaxTile, a block would use half of the sets of the level-1 cache. This is the block of tile
/// `first`, with `size` elements along the sum.
SPARSE_ATTN_INLINE AmxRows of_columns(const BFloat16* data, int first, int size) {
  return {data + first * kAmxRows * size, kAmxColumns * kAmxSum};
}

/// Rows of `size` elements -> such operands, pairs along the rows.
SPARSE_ATTN_INLINE void pair_columns(BFloat16* to, const BFloat16* from, int rows, int size) {
  constexpr int kBlock = kAmxColumns * kAmxRows;
  for (int r = 0; r < rows; r += kBlock) {
    const int count = rows - r < kBlock ? rows - r : kBlock;
    transpose_pairs(to + r * size, kBlock, from + r * size, count, size / 2);
  }
}

/// For the masked forms of intrinsics whose plain form g++ 12 warns of.
constexpr __mmask16 kAllLanes = 0xffff;

/// 2^x, within 2e-7 of it relatively; 0 for x = -inf; NaN for NaN. The polynomial is the best one
/// of 2^r for r in [0, 1] that is 1 at 0.
SPARSE_ATTN_INLINE __m512 power_of_two(__m512 x) {
  constexpr int kDown = 1;
  const __m512 r = _mm512_reduce_ps(x, kDown);
  __m512 sum = _mm512_set1_ps(0.0018671302134470212f);
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.009017030018515709f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.055799913320871336f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.2401644500956467f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.6931513118094682f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
  return _mm512_mask_scalef_ps(sum, kAllLanes, sum, x);
}

/// Vectors of 16 numbers -> one of 32 bfloat16, the first one's first.
SPARSE_ATTN_INLINE __m512i narrow_both(__m512 first, __m512 second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

/// Halves of a vector of 32 bfloat16 -> pairs.
SPARSE_ATTN_INLINE __m512i zip_halves(__m512i words) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), words);
}

/// The bits of one vector of queries.
SPARSE_ATTN_INLINE __mmask16 lanes_of(uint64_t word, int vector) {
  return static_cast<__mmask16>(word >> (vector * kAmxRows));
}

}  // namespace
