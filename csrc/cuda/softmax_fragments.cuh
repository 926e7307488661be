// The softmax of a warp's 16 rows in its fragments.
#pragma once

#include "cuda/fragments.cuh"

namespace sparse_attn::cuda {

/// Maxima are raised only by at least so much, in units of log 2: most steps then leave the sums as
/// they are, at probabilities of up to 2^8 instead of 1.
constexpr float kSlack = 8.0f;

/// Raises the maximum of a row for logits s * scale in units of log 2, and returns what the sums so
/// far are to be multiplied with.
template <int kTiles>
__device__ inline float raise_maximum(const float (&s)[kTiles][4], int half, float scale,
                                      float& maximum) {
  float top = -kInfinity;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
  top = fmaxf(top, shuffle_xor(top, 1));
  top = fmaxf(top, shuffle_xor(top, 2));
  top = top == -kInfinity ? top : top * scale;
  top = top > maximum + kSlack ? top : maximum;
  const float factor = exp2_approx(maximum - finite_maximum(top));
  maximum = top;
  return factor;
}

/// 2^x by additions and multiplications alone. The relative error is below 3e-6; 0 for -inf, and
/// NaN stays NaN.
__device__ inline float exp2_by_polynomial(float x) {
  constexpr float kRounds = 0x1.8p23f;  // the last bits of a sum with it are the other, rounded
  x = x < -127.0f ? -127.0f : x;
  const float rounded = x + kRounds;
  const float f = x - (rounded - kRounds);
  // Minimax on [-1/2, 1/2], with 1 at 0.
  float power = fmaf(9.582853e-3f, f, 5.5906425e-2f);
  power = fmaf(power, f, 2.4024099e-1f);
  power = fmaf(power, f, 6.9312419e-1f);
  power = fmaf(power, f, 1.0f);
  std::uint32_t bits;
  memcpy(&bits, &rounded, sizeof(bits));
  bits = (bits << 23) + 0x3f800000u;  // 2 to the rounded one, 0 for -127
  float scale;
  memcpy(&scale, &bits, sizeof(scale));
  return power * scale;
}

/// Logits become probabilities, which are added to the sum: of the lane's columns alone. One pair
/// of columns in `kPolynomials` (0: none) is left to multiplications.
template <int kPolynomials, int kTiles>
__device__ inline void exponentiate(float (&s)[kTiles][4], int half, float scale, float maximum,
                                    float& sum) {
  const float finite = finite_maximum(maximum);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 2 * half; i < 2 * half + 2; ++i) {
      const float x = fmaf(s[n][i], scale, -finite);
      const bool is_polynomial = kPolynomials > 0 && n % (kPolynomials + !kPolynomials) == 0;
      s[n][i] = is_polynomial ? exp2_by_polynomial(x) : exp2_approx(x);
      sum += s[n][i];
    }
  }
}

/// The states of a warp's rows. Maxima are in units of log 2, sums of the lane's columns.
template <class S, int kTiles>
struct StateFragments {
  float (&output)[kTiles][4];
  float (&maximum)[2];
  float (&sum)[2];

  __device__ void clear() {
    cuda::clear(output);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      maximum[half] = -kInfinity;
      sum[half] = 0.0f;
    }
  }

  /// Goes on from the states that an earlier sweep left of rows of tile g. The sum goes to one lane
  /// of the four; the outputs are multiplied with `factor`.
  __device__ void resume(const Arguments& a, const Work& work, int g, int first_row, float factor) {
    const int lane = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = fragment_row(first_row, half);
      if (!work.owns(g, row)) continue;
      const StateRow<float> state = work.row_state<float>(a, g, row);
      maximum[half] = *state.maximum * kLog2E;
      sum[half] = lane == 0 ? *state.sum : 0.0f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int column = 8 * n + 2 * lane;
        if (column >= a.call.value_dim) continue;
        output[n][2 * half] = state.output[column] * factor;
        output[n][2 * half + 1] = state.output[column + 1] * factor;
      }
    }
  }

  /// Adds up the lanes' sums and writes the rows of tile g, the outputs multiplied with `factor`.
  __device__ void write(const Arguments& a, const Work& work, int g, int first_row,
                        float factor) const {
    const int lane = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float whole = sum[half];
      whole += shuffle_xor(whole, 1);
      whole += shuffle_xor(whole, 2);
      const int row = fragment_row(first_row, half);
      if (!work.owns(g, row)) continue;
      const RowSink<S> sink(a, work, g, row);
      if (lane == 0) sink.put_sums(maximum[half] * kLn2, whole);
      write_row(sink, output, half, factor * sink.factor(whole),
                static_cast<int>(a.call.value_dim));
    }
  }
};

}  // namespace sparse_attn::cuda
