// The softmax of a tile of scores [key][query] for AMX, whose next product takes pairs of keys.
#pragma once

#include "amx.h"
#include "softmax.h"

namespace {

/// Scores -> exp(scale · score - maximum) as pairs [key / 2][query][2], for kVectors vectors of
/// queries; `keys` is a multiple of 32 if `kMasked` is false, and masks go on to one otherwise.
///
/// `maximum` stays as it is while no logit is larger by more than kSlack: the sums so far and the
/// output then need no factor. What a sum is relative to does not matter to its rounding.
template <int kVectors, bool kMasked>
SPARSE_ATTN_INLINE void amx_softmax_columns(const float* scores, const uint64_t* words, int first,
                                            int keys, float scale, SoftmaxState<float>& state,
                                            float* rescale, BFloat16* pairs) {
  constexpr float kSlack = 8.0f, kLog2EFloat = static_cast<float>(kLog2E);
  const __m512 lowest = _mm512_set1_ps(-kInfinity<float>);
  __m512 top[2][kVectors], total[kVectors], shift[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) top[0][v] = top[1][v] = lowest;
  const auto score = [&](int k, int v) {
    return _mm512_loadu_ps(scores + k * kMaxTile + (first + v) * kAmxRows);
  };
  const auto lanes = [&](int k, int v) {
    return kMasked ? lanes_of(words[k], first + v) : kAllLanes;
  };
  for (int k = 0; k < keys; k += 2) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        __m512& t = top[i][v];  // of a NaN and a maximum, max takes the second
        t = _mm512_mask_max_ps(t, lanes(k + i, v), score(k + i, v), t);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int at = (first + v) * kAmxRows;
    const __m512 before = _mm512_loadu_ps(state.maximum + at);
    const __m512 most = _mm512_mul_ps(max<float>(top[0][v], top[1][v]), _mm512_set1_ps(scale));
    const __mmask16 rises =
        _mm512_cmp_ps_mask(most, _mm512_add_ps(before, _mm512_set1_ps(kSlack)), _CMP_GT_OQ);
    const __m512 now = _mm512_mask_mov_ps(before, rises, most);
    const __m512 finite = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(now, lowest, _CMP_NEQ_UQ), now);
    const __m512 factor =
        power_of_two(_mm512_mul_ps(_mm512_sub_ps(before, finite), _mm512_set1_ps(kLog2EFloat)));
    _mm512_storeu_ps(rescale + at, factor);
    _mm512_storeu_ps(state.maximum + at, now);
    total[v] = _mm512_mul_ps(_mm512_loadu_ps(state.sum + at), factor);
    shift[v] = _mm512_mul_ps(finite, _mm512_set1_ps(kLog2EFloat));
  }
  const __m512 factor = _mm512_set1_ps(scale * kLog2EFloat);
  const auto weight = [&](int k, int v) {
    return _mm512_maskz_mov_ps(lanes(k, v),
                               power_of_two(_mm512_fmsub_ps(score(k, v), factor, shift[v])));
  };
  for (int k = 0; k < keys; k += 2) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const __m512 p = weight(k, v), q = weight(k + 1, v);
      total[v] = _mm512_add_ps(total[v], _mm512_add_ps(p, q));
      store_words(pairs + k * kMaxTile + (first + v) * kAmxSum, zip_halves(narrow_both(p, q)));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(state.sum + (first + v) * kAmxRows, total[v]);
}

/// The same for all vectors; `scale` > 0. Without `words` every query sees every key, a multiple of
/// 32.
template <bool kMasked>
__attribute__((noinline)) void amx_softmax(const float* scores, const uint64_t* words, int keys,
                                           int vectors, float scale, SoftmaxState<float>& state,
                                           float* rescale, BFloat16* pairs) {
  int v = 0;
  for (; v + 2 <= vectors; v += 2)
    amx_softmax_columns<2, kMasked>(scores, words, v, keys, scale, state, rescale, pairs);
  if (v < vectors)
    amx_softmax_columns<1, kMasked>(scores, words, v, keys, scale, state, rescale, pairs);
}

/// P = exp(logit - lse), at most 1: see probability() of softmax.h.
SPARSE_ATTN_INLINE __m512 amx_probability(__m512 logit, __m512 lse) {
  const __m512 x =
      _mm512_mul_ps(_mm512_sub_ps(logit, lse), _mm512_set1_ps(static_cast<float>(kLog2E)));
  const __m512 zero = _mm512_setzero_ps();  // of a NaN and a minimum, min takes the second
  return power_of_two(_mm512_mask_min_ps(zero, kAllLanes, zero, x));
}

/// Numbers [key][query] -> pairs of keys, zeros where masked. Masks as above.
inline void pair_keys(const float* numbers, const uint64_t* words, int keys, int vectors,
                      BFloat16* pairs) {
  for (int k = 0; k < keys; k += 2) {
    for (int v = 0; v < vectors; ++v) {
      const auto number = [&](int at) {
        const __mmask16 lanes = words ? lanes_of(words[at], v) : kAllLanes;
        return _mm512_maskz_loadu_ps(lanes, numbers + at * kMaxTile + v * kAmxRows);
      };
      store_words(pairs + k * kMaxTile + v * kAmxSum,
                  zip_halves(narrow_both(number(k), number(k + 1))));
    }
  }
}

}  // namespace
