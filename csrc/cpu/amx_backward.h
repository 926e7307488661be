// What a tile of pairs adds to the gradients, on AMX tiles: see backward.h.
//
//   S = K Qᵀ        rows of K, columns of Q       dV += P dO    rows of P, pairs of dO
//   dP = V dOᵀ      rows of V, columns of dO      dK += dS Q    rows of dS, pairs of Q
//                                                 dQᵀ += Kᵀ dS  columns of K, pairs of dS
//
// S, dP and all sums are float32; P and dS are rounded to bfloat16 for the products that read them.
#pragma once

#include "amx_keys.h"
#include "amx_rows.h"
#include "amx_softmax.h"
#include "backward.h"

namespace {

class AmxPairGradients {
 public:
  AmxPairGradients(Arena& arena, const AttentionParams& params)
      : p_(params),
        rows_(arena, params),
        keys_(arena, params),
        modifiers_(arena),
        scores_(arena.take<float>(kMaxTile * kMaxTile)),
        gradients_(arena.take<float>(kMaxTile * kMaxTile)),
        slopes_(arena.take<float>(kMaxTile * kMaxTile)),
        p_rows_(arena.take<BFloat16>(kMaxTile * kMaxTile)),
        ds_rows_(arena.take<BFloat16>(kMaxTile * kMaxTile)),
        ds_pairs_(arena.take<BFloat16>(kMaxTile * kAmxColumns * kAmxRows)),
        lse_(arena.take<float>(kMaxTile)),
        delta_(arena.take<float>(kMaxTile)),
        last_(arena.take<float>(int64_t{kAmxRows} * round_up(longest(params), kAmxRows))) {}

  void start(const PlanView& plan, const PassView& pass, int64_t head) {
    head_ = head;
    list_ = plan.token_list;
    keys_.start(plan, pass, head);
    modifiers_.start(p_, head);
  }

  void load_rows(const RowTile& tile, const int64_t* list) {
    rows_.load(head_, tile, list);
    modifiers_.set_rows(tile.rows, list);
    row_tiles_ = round_up(tile.rows.count, kAmxSum) / kAmxRows;
    for (int i = 0; i < kMaxTile; i += kLanes<float>) {
      store(lse_ + i, load(rows_.lse + i) * static_cast<float>(kLog2E));
      store(delta_ + i, load(rows_.delta + i) * static_cast<float>(p_.scale));
    }
  }

  bool get(int32_t key_tile, int32_t mask) {
    if (!keys_.get(key_tile, mask, now_)) return false;
    if (modifiers_.exist()) modifiers_.set_keys(keys_.tile(key_tile), list_);
    return true;
  }

  void add(float* grad_query, AddTo<float> to_key, AddTo<float> to_value, FetchStack& fetches) {
    const bool modified = modifiers_.exist();
    if (modified) {
      for (int first = 0; first < row_tiles_; first += kAmxColumns)
        multiply(first, first * kAmxRows, kMaxTile);
      modify();
    }
    for (int first = 0; first < row_tiles_; first += kAmxColumns) {
      if (modified) {
        narrow(Modified{scores_, gradients_}, first, fetches.take());
      } else {
        multiply(first, 0, kAmxColumns * kAmxRows);
        narrow(Plain(*this), first, fetches.take());
      }
      amx_product<true>(round_up(rows_.query.size(), kAmxRows) / kAmxRows, kAmxColumns,
                        round_up(now_.count, kAmxSum) / kAmxSum, now_.columns,
                        {ds_pairs_, kAmxColumns * kAmxSum},
                        {grad_query + first * kAmxRows, kMaxTile});
    }
    add_keys(to_value, p_rows_, rows_.grad_output);
    add_keys(to_key, ds_rows_, rows_.query);
  }

 private:
  struct PairOfVectors {
    __m512 p, ds;
  };

  /// P and dS of vector n of the queries, the v-th one at hand, as modify() left them.
  struct Modified {
    SPARSE_ATTN_INLINE PairOfVectors operator()(int k, int n, int /*v*/) const {
      const int at = k * kMaxTile + n * kAmxRows;
      return {_mm512_loadu_ps(scores + at), _mm512_loadu_ps(gradients + at)};
    }
    const float *scores, *gradients;
  };

  /// The same from what multiply() left.
  struct Plain {
    explicit Plain(const AmxPairGradients& of)
        : scores(of.scores_),
          gradients(of.gradients_),
          lse(of.lse_),
          delta(of.delta_),
          scale(_mm512_set1_ps(static_cast<float>(of.p_.scale))),
          exponent(_mm512_set1_ps(static_cast<float>(of.p_.scale * kLog2E))) {}

    SPARSE_ATTN_INLINE PairOfVectors operator()(int k, int n, int v) const {
      const int at = (k * kAmxColumns + v) * kAmxRows;
      const __m512 zero = _mm512_setzero_ps();
      const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores + at), exponent,
                                       _mm512_loadu_ps(lse + n * kAmxRows));
      // At most 1, as in softmax.h; of a NaN and a minimum, min takes the second.
      const __m512 p = power_of_two(_mm512_mask_min_ps(zero, kAllLanes, zero, x));
      const __m512 rest = _mm512_fmsub_ps(_mm512_loadu_ps(gradients + at), scale,
                                          _mm512_loadu_ps(delta + n * kAmxRows));
      return {p, _mm512_mul_ps(p, rest)};
    }

    const float *scores, *gradients, *lse, *delta;
    const __m512 scale, exponent;
  };

  /// Scores and gradients of the probabilities for a block of queries.
  void multiply(int first, int at, int stride) {
    const int key_tiles = round_up(now_.count, kAmxRows) / kAmxRows;
    amx_product<false>(key_tiles, kAmxColumns, rows_.query.sum_tiles(), now_.key,
                       rows_.query.columns(first), {scores_ + at, stride});
    amx_product<false>(key_tiles, kAmxColumns, rows_.grad_output.sum_tiles(), now_.value,
                       rows_.grad_output.columns(first), {gradients_ + at, stride});
  }

  static int longest(const AttentionParams& params) {
    return static_cast<int>(params.head_dim > params.value_dim ? params.head_dim
                                                               : params.value_dim);
  }

  /// Scores -> probabilities and gradients of probabilities -> of scores, by the text that all
  /// types share.
  void modify() {
    const int vectors = rows_.vectors;
    const auto scale = static_cast<float>(p_.scale);
    const auto for_each = [&](const auto& visit) {
      for_each_vector<float>(now_.count, vectors, visit);
    };
    for_each([&](int at, int, int) { store(scores_ + at, load(scores_ + at) * scale); });
    if (modifiers_.shapes()) {
      modifiers_.shape(scores_, slopes_, vectors, now_.words, rows_.lse);
    } else {
      const Probabilities<float> probabilities{scores_, rows_.lse};
      for_each([&](int at, int k, int v) { probabilities(k, v, load(scores_ + at)); });
    }
    const LogitGradients<float> logits{gradients_, scores_, rows_.delta, scale};
    const auto by_logits = [&](const auto& of) {
      for_each([&](int at, int k, int v) { of(k, v, load(gradients_ + at)); });
    };
    if (modifiers_.drops()) {
      by_logits(DroppedLogitGradients<float>{logits, scores_, modifiers_.mark_dropped(scores_)});
    } else {
      by_logits(logits);
    }
    if (modifiers_.shapes()) modifiers_.multiply(gradients_, slopes_, vectors);
  }

  template <class Values>
  void narrow(const Values& values, int first, FetchBlock ahead) {
    if (now_.words || rows_.live != ~uint64_t{0}) {
      narrow_columns<true>(values, first, ahead);
    } else {
      narrow_columns<false>(values, first, ahead);
    }
  }

  /// Writes P and dS as the products take them, zero where the mask or a row without keys says so.
  template <bool kMasked, class Values>
  __attribute__((noinline)) void narrow_columns(const Values& values, int first, FetchBlock ahead) {
    const int keys = round_up(now_.count, kAmxSum);
    for (int k = 0; k < keys; k += 2) {
      PairOfVectors of[2][kAmxColumns];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const uint64_t word =
            kMasked ? (now_.words ? now_.words[k + i] : ~uint64_t{0}) & rows_.live : 0;
#pragma GCC unroll 2
        for (int v = 0; v < kAmxColumns; ++v) {
          const __mmask16 lanes = kMasked ? lanes_of(word, first + v) : kAllLanes;
          const PairOfVectors x = values(k + i, first + v, v);
          ahead.fetch(k + i, v);
          of[i][v] = {_mm512_maskz_mov_ps(lanes, x.p), _mm512_maskz_mov_ps(lanes, x.ds)};
        }
        const int at = (k + i) * kMaxTile + first * kAmxRows;
        store_words(p_rows_ + at, narrow_both(of[i][0].p, of[i][1].p));
        store_words(ds_rows_ + at, narrow_both(of[i][0].ds, of[i][1].ds));
      }
#pragma GCC unroll 2
      for (int v = 0; v < kAmxColumns; ++v) {
        store_words(ds_pairs_ + (k / 2 * kAmxColumns + v) * kAmxSum,
                    zip_halves(narrow_both(of[0][v].ds, of[1][v].ds)));
      }
    }
  }

  /// Adds to the rows of dK or dV. What a whole tile of them would reach beyond the last key goes
  /// through memory of its own.
  void add_keys(AddTo<float> sums, const BFloat16* factors, const AmxTileRows& rows) const {
    const int columns = round_up(rows.size(), kAmxRows) / kAmxRows, sum_tiles = row_tiles_ / 2;
    const int whole = now_.count / kAmxRows, first = whole * kAmxRows;
    amx_product<true>(whole, columns, sum_tiles, {factors, kMaxTile}, rows.pairs(),
                      {sums.c, sums.stride});
    if (first == now_.count) return;
    const int width = columns * kAmxRows;
    amx_product<false>(1, columns, sum_tiles, {factors + first * kMaxTile, kMaxTile}, rows.pairs(),
                       {last_, width});
    for (int k = first; k < now_.count; ++k)
      add_row(sums.c + k * sums.stride, last_ + (k - first) * width, width);
  }

  const AmxTiles tiles_;
  const AttentionParams& p_;
  int64_t head_ = 0;
  const int64_t* list_ = nullptr;
  int row_tiles_ = 0;
  GradientRows<BFloat16, AmxTileRows> rows_;
  AmxKeyTiles<true> keys_;
  AmxKeyTile now_{};
  TileModifiers<float> modifiers_;
  float* scores_;                // [key][query], of all queries or a block; or probabilities
  float* gradients_;             // of the probabilities, or of the scores
  float* slopes_;                // of the logits in the scores
  BFloat16 *p_rows_, *ds_rows_;  // [key][query]
  BFloat16* ds_pairs_;           // of a block, [key / 2][query][2]
  float *lse_, *delta_;          // [query], times log2(e) and times the scale
  float* last_;                  // sums of keys that are no whole tile
};

}  // namespace
