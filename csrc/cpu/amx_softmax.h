// The softmax of a tile of scores [key][query] for AMX, whose next product takes pairs of keys.
#pragma once

#include "amx.h"
#include "fetch_ahead.h"
#include "softmax.h"

namespace {

/// Scores [key][kAmxColumns vectors], which become exp(scale · score - maximum) as pairs
/// [key / 2][query][2] of the vectors from `first` on; `scale` > 0. `keys` is a multiple of 32:
/// masks are zero beyond the last key.
struct AmxSoftmax {
  const float* scores;
  const uint64_t* words;
  int keys, first;
  float scale;
  SoftmaxState<float>& state;
  float* rescale;
  BFloat16* pairs;
  FetchBlock ahead;

  SPARSE_ATTN_INLINE __m512 score(int k, int v) const {
    return _mm512_loadu_ps(scores + (k * kAmxColumns + v) * kAmxRows);
  }
  template <bool kMasked>
  SPARSE_ATTN_INLINE __mmask16 lanes(int k, int v) const {
    return kMasked ? lanes_of(words[k], first + v) : kAllLanes;
  }
};

/// The maxima stay as they are while no logit is larger by more than kSlack: the sums so far and
/// the output then need no factor. What a sum is relative to does not matter to its rounding.
template <int kVectors, bool kMasked>
SPARSE_ATTN_INLINE void amx_softmax_vectors(const AmxSoftmax& s) {
  constexpr float kSlack = 8.0f, kLog2EFloat = static_cast<float>(kLog2E);
  const __m512 lowest = _mm512_set1_ps(-kInfinity<float>), log2e = _mm512_set1_ps(kLog2EFloat);
  __m512 top[2][kVectors], total[kVectors], shift[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) top[0][v] = top[1][v] = lowest;
  for (int k = 0; k < s.keys; k += 2) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        __m512& t = top[i][v];  // of a NaN and a maximum, max takes the second
        t = _mm512_mask_max_ps(t, s.lanes<kMasked>(k + i, v), s.score(k + i, v), t);
      }
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int at = (s.first + v) * kAmxRows;
    const __m512 before = _mm512_loadu_ps(s.state.maximum + at);
    const __m512 most = _mm512_mul_ps(max<float>(top[0][v], top[1][v]), _mm512_set1_ps(s.scale));
    const __mmask16 rises =
        _mm512_cmp_ps_mask(most, _mm512_add_ps(before, _mm512_set1_ps(kSlack)), _CMP_GT_OQ);
    const __m512 now = _mm512_mask_mov_ps(before, rises, most);
    const __m512 finite = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(now, lowest, _CMP_NEQ_UQ), now);
    const __m512 factor = power_of_two(_mm512_mul_ps(_mm512_sub_ps(before, finite), log2e));
    _mm512_storeu_ps(s.rescale + at, factor);
    _mm512_storeu_ps(s.state.maximum + at, now);
    total[v] = _mm512_mul_ps(_mm512_loadu_ps(s.state.sum + at), factor);
    shift[v] = _mm512_mul_ps(finite, log2e);
  }
  const __m512 factor = _mm512_set1_ps(s.scale * kLog2EFloat);
  const auto weight = [&](int k, int v) {
    const __m512 p = power_of_two(_mm512_fmsub_ps(s.score(k, v), factor, shift[v]));
    return _mm512_maskz_mov_ps(s.lanes<kMasked>(k, v), p);
  };
  for (int k = 0; k < s.keys; k += 2) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const __m512 p = weight(k, v), q = weight(k + 1, v);
      s.ahead.fetch(k, v);
      s.ahead.fetch(k + 1, v);
      total[v] = _mm512_add_ps(total[v], _mm512_add_ps(p, q));
      store_words(s.pairs + (k / 2 * kAmxColumns + v) * kAmxSum, zip_halves(narrow_both(p, q)));
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v)
    _mm512_storeu_ps(s.state.sum + (s.first + v) * kAmxRows, total[v]);
}

template <bool kMasked>
__attribute__((noinline)) void amx_softmax(const AmxSoftmax& softmax, int vectors) {
  if (vectors == kAmxColumns) {
    amx_softmax_vectors<kAmxColumns, kMasked>(softmax);
  } else {
    amx_softmax_vectors<1, kMasked>(softmax);
  }
}

/// Numbers [key][kMaxTile queries] -> such pairs, zeros where masked. Masks as above.
inline void pair_keys(const float* numbers, const uint64_t* words, int keys, int first, int vectors,
                      BFloat16* pairs) {
  for (int k = 0; k < keys; k += 2) {
    for (int v = 0; v < vectors; ++v) {
      const auto number = [&](int at) {
        const __mmask16 lanes = words ? lanes_of(words[at], first + v) : kAllLanes;
        return _mm512_maskz_loadu_ps(lanes, numbers + at * kMaxTile + (first + v) * kAmxRows);
      };
      store_words(pairs + (k / 2 * kAmxColumns + v) * kAmxSum,
                  zip_halves(narrow_both(number(k), number(k + 1))));
    }
  }
}

}  // namespace
