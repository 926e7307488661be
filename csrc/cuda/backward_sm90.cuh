// Backward on sm_90a: as mma_backward.cuh, a sweep by tiles of rows for dQ and one by tiles of keys
// for dK and dV, so that nothing is added by two blocks. A warpgroup has a tile of its own side,
// and products of one visit go on while the elements of the next are computed.
#pragma once

#include "cuda/config.h"
#include "cuda/fragments.cuh"
#include "cuda/products_sm90.cuh"

namespace sparse_attn::cuda {

/// What comes with a tile: of keys, which of them are there and no padding; of rows, log-sum-exps
/// (in units of log 2; +inf for rows that are another tile's, without keys or beyond the end, so
/// that their P is 0), and deltas with the tile of dO.
template <Grad kGrad>
struct TileNote {
  float rows[kMaxTile];
};
template <>
struct TileNote<Grad::kQuery> {
  std::uint64_t keys;
};

/// kGrad: kQuery or kKeyValue.
template <class S, int kHeadSize, Grad kGrad>
class Sm90Backward {
  static constexpr bool kByRows = kGrad == Grad::kQuery;
  static constexpr Side kSide = kByRows ? Side::kRows : Side::kKeys;
  static constexpr int kStages = kHeadSize > 64 ? 6 : 8;
  /// Else dS is made of P as it goes into the product for dV: two sums of 64 registers leave no
  /// room for another P.
  static constexpr bool kKeepsP = kByRows || kHeadSize <= 64;
  using Copies = TileCopies<S, kHeadSize>;
  using Products = WarpgroupProducts<S, kHeadSize>;
  using Shared = Sm90Shared<2, kStages, Copies::kTileBytes, TileNote<kGrad>>;
  using Place = typename Shared::Other::Place;
  using OwnPlace = typename Shared::Own::Place;

 public:
  static constexpr int kThreads = kSm90Threads;
  static constexpr int kBlocksPerSM = 1;
  static constexpr int kSharedBytes = Shared::kBytes;

  static __device__ void run(const Sm90Arguments& a) {
    const Shared shared(shared_memory());
    shared.init();
    if (threadIdx.x < kWarpgroup) {
      lower_registers<kProducerRegisters>();
      Producer(a, shared).run();
    } else {
      raise_registers<kConsumerRegisters>();
      Consumer(a, shared).run();
    }
  }

 private:
  static __device__ const float* lse_of(const Arguments& a, std::int64_t batch, std::int64_t head) {
    return static_cast<const float*>(a.call.lse) + first_row_of(a.call, batch, head);
  }
  static __device__ const float* delta_of(const Arguments& a, std::int64_t batch,
                                          std::int64_t head) {
    return static_cast<const float*>(a.delta) + first_row_of(a.call, batch, head);
  }

  /// Numbers of a tile's rows, two in each lane of a warp.
  class RowsOfLane {
   public:
    __device__ RowsOfLane(const RowTile& tile, const std::int64_t* list)
        : tile_(tile), list_(list), lane_(static_cast<int>(threadIdx.x) % 32) {}

    __device__ bool owned(int i) const { return (tile_.owned >> (lane_ + 32 * i) & 1) != 0; }
    __device__ void load(float (&of_rows)[2], const float* from, float without) const {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = lane_ + 32 * i;
        of_rows[i] = row < tile_.rows.count ? from[token(tile_.rows, list_, row)] : without;
      }
    }
    /// By the warp that tells when the tile is there.
    __device__ void store(TileNote<kGrad>& to, const float (&of_rows)[2]) const {
      if (threadIdx.x < 32) {
        to.rows[lane_] = of_rows[0];
        to.rows[lane_ + 32] = of_rows[1];
      }
      sync_warp();
    }

   private:
    const RowTile& tile_;
    const std::int64_t* const list_;
    const int lane_;
  };

  class Producer {
   public:
    __device__ Producer(const Sm90Arguments& a, const Shared& shared) : a_(a), shared_(shared) {}

    __device__ void run() {
      for_each_task(a_, kSide, a_.base.grad_query.add, [&](const Work& work, std::int64_t) {
        const Copies copies(a_, work);
#pragma unroll
        for (int g = 0; g < kConsumers; ++g) {
          if (work.has_tile(g)) copy_own(copies, work, g);
        }
        for (std::int64_t head = work.head; head < work.end_head(); ++head) {
          for (VisitWalk walk(work); !walk.done(); walk.next()) {
            if constexpr (kByRows) {
              copy_keys(copies, work, work.other_tile(walk.tile()));
            } else {
              copy_rows(copies, work, work.pass->row_tiles[walk.tile()], head);
            }
          }
        }
      });
    }

   private:
    /// Rows of queries need not be live: each is a row of dQ alone.
    __device__ void copy_own(const Copies& copies, const Work& work, int g) {
      const Tile& tile = work.own_tile(g);
      const std::uint64_t live =
          kByRows ? first_rows(tile.count) : live_keys(a_.base.call, work, tile);
      const auto start = [&](const TileSource<S>& from) {
        OwnPlace& place = own_place_[g];
        shared_.own[g].await_empty(place);
        copies.start(shared_.own[g].tile(place), shared_.own[g].full(place), from, tile, live);
        place.next();
      };
      start(kByRows ? query_source<S>(a_, work, work.head) : key_source<S>(a_, work));
      start(kByRows ? grad_output_source<S>(a_, work, work.head) : value_source<S>(a_, work));
    }

    __device__ void copy_keys(const Copies& copies, const Work& work, const Tile& keys) {
      const std::uint64_t live = live_keys(a_.base.call, work, keys);
      const auto note = [&](TileNote<kGrad>& to) {
        if (threadIdx.x == 0) to.keys = live;
      };
      copy(copies, keys, live, key_source<S>(a_, work), note);
      copy(copies, keys, live, value_source<S>(a_, work), note);
    }

    __device__ void copy_rows(const Copies& copies, const Work& work, const RowTile& tile,
                              std::int64_t head) {
      const RowsOfLane rows(tile, work.pass->token_list);
      const float* lse = lse_of(a_.base, work.batch, head);
      float of_rows[2];
      rows.load(of_rows, lse, -kInfinity);
      const std::uint64_t live = ballot(of_rows[0] != -kInfinity) |
                                 static_cast<std::uint64_t>(ballot(of_rows[1] != -kInfinity)) << 32;
      bool counts[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        counts[i] = rows.owned(i) && of_rows[i] != -kInfinity;
        of_rows[i] = counts[i] ? of_rows[i] * kLog2E : kInfinity;
      }
      copy(copies, tile.rows, live, query_source<S>(a_, work, head),
           [&](TileNote<kGrad>& to) { rows.store(to, of_rows); });
      rows.load(of_rows, delta_of(a_.base, work.batch, head), 0.0f);
#pragma unroll
      for (int i = 0; i < 2; ++i) of_rows[i] = counts[i] ? of_rows[i] : 0.0f;
      copy(copies, tile.rows, live, grad_output_source<S>(a_, work, head),
           [&](TileNote<kGrad>& to) { rows.store(to, of_rows); });
    }

    /// The next tile, and the note about it. Rows that are not live become zeros, whatever they
    /// hold.
    template <class Note>
    __device__ void copy(const Copies& copies, const Tile& tile, std::uint64_t live,
                         const TileSource<S>& from, Note note) {
      shared_.other.await_empty(place_);
      note(shared_.notes[place_.stage]);
      copies.start(shared_.other.tile(place_), shared_.other.full(place_), from, tile, live);
      place_.next();
    }

    const Sm90Arguments& a_;
    const Shared& shared_;
    Place place_;
    OwnPlace own_place_[kConsumers];
  };

  class Consumer {
   public:
    __device__ Consumer(const Sm90Arguments& a, const Shared& shared)
        : a_(a.base),
          all_(a),
          shared_(shared),
          consumer_(consumer_number()),
          warp_row_(static_cast<int>(threadIdx.x) % kWarpgroup / 32 * 16),
          scale_(static_cast<float>(a.base.call.scale) * kLog2E) {}

    __device__ void run() {
      for_each_task(all_, kSide, a_.grad_query.add, [&](const Work& work, std::int64_t task) {
        sum(work);
        // The fields of `work` would take 20 registers all the while.
        write(work_of(all_, kSide, anew(task)));
      });
    }

   private:
    using Logits = typename Products::Logits;
    using Sums = typename Products::Sums;

    __device__ void sum(const Work& work) {
      clear(sum_x_);
      if (!kByRows) clear(sum_y_);
      load_own(work);
      for (std::int64_t head = work.head; head < work.end_head(); ++head) {
        ConsumerWalk walk(work, consumer_);
        while (walk.seek(shared_.other, place_)) stream(work, walk);
      }
      let_go_of_own(work);
    }

    // ---- tiles --------------------------------------------------------------------------------

    /// Own X and Y stay where they are until the task is done.
    __device__ void load_own(const Work& work) {
      if (!any_lane(work.has_tile(consumer_))) return;
      const auto& own = shared_.own[consumer_];
      own.await_full(own_place_);
      own_x_ = own.tile(own_place_);
      own.await_full(own_place_.following());
      own_y_ = own.tile(own_place_.following());
      load_own_rows(work);
    }
    __device__ void let_go_of_own(const Work& work) {
      if (!any_lane(work.has_tile(consumer_))) return;
      for (int i = 0; i < 2; ++i, own_place_.next()) shared_.own[consumer_].release(own_place_);
    }

    __device__ int row(int half) const { return fragment_row(warp_row_, half); }

    /// Of the lane's two rows: of queries the log-sum-exp and delta; of keys whether they count.
    __device__ void load_own_rows(const Work& work) {
      const Tile& tile = work.own_tile(consumer_);
      const std::uint8_t* padding = padding_of(a_.call, work.batch);
      all_count_ = tile.count == kMaxTile && padding == nullptr;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        lse_[half] = kInfinity;
        delta_[half] = 0.0f;
        counts_[half] = false;
        if (!work.owns(consumer_, row(half))) continue;
        const std::int64_t t = work.own_token(consumer_, row(half));
        if (!kByRows) {
          counts_[half] = padding == nullptr || padding[t] == 0;
          continue;
        }
        const float lse = lse_of(a_, work.batch, work.head)[t];
        if (lse == -kInfinity) continue;
        lse_[half] = lse * kLog2E;
        delta_[half] = delta_of(a_, work.batch, work.head)[t];
      }
    }

    // ---- products -----------------------------------------------------------------------------

    /// Visits that follow each other: S of the next is made while the sums of this one are.
    __device__ void stream(const Work& work, ConsumerWalk& walk) {
      Place x = place_, y = x.following();
      start_logits(work, walk, x);
      if (kByRows) start_other_products(y);
      for (;;) {
        sum_pair(x, y);
        place_ = y.following();
        walk.next();
        if (!walk.is_mine()) break;
        start_logits(work, walk, place_);
        wgmma_wait<1>();
        finish_sums(x, y);
        x = place_;
        y = x.following();
        if (kByRows) start_other_products(y);
      }
      wgmma_wait<0>();
      finish_sums(x, y);
    }

    /// S is under way when it begins, what it adds to the sums when it returns. By tiles of keys dP
    /// has to wait until P is packed: there are no registers for more beside two sums.
    __device__ void sum_pair(const Place& x, const Place& y) {
      wgmma_wait<(kByRows ? 1 : 0)>();  // S, not dP
      pin(s_);
      probabilities(shared_.notes[x.stage]);
      if constexpr (!kByRows) {
        Products::as_operand(p_, s_);
        start_other_products(y);
        start_sum(sum_y_, p_, y);
      }
      wgmma_wait<(kByRows ? 0 : 1)>();  // dP
      pin(dp_);
      logit_gradients(shared_.notes[y.stage]);
      Products::as_operand(ds_, dp_);
      start_sum(sum_x_, ds_, x);
    }

    __device__ void finish_sums(const Place& x, const Place& y) {
      pin(sum_x_);
      if constexpr (!kByRows) pin(sum_y_);
      shared_.other.release(x);
      shared_.other.release(y);
    }

    /// S or its transpose.
    __device__ void start_logits(const Work& work, const ConsumerWalk& walk, const Place& x) {
      shared_.other.await_full(x);
      load_words(work, walk, shared_.notes[x.stage]);
      start_product(s_, own_x_, x);
    }
    /// dP or its transpose.
    __device__ void start_other_products(const Place& y) {
      shared_.other.await_full(y);
      start_product(dp_, own_y_, y);
    }
    __device__ void start_product(Logits& d, const char* own, const Place& place) {
      pin(d);
      wgmma_fence();
      Products::rows_by_rows(d, own, shared_.other.tile(place));
      wgmma_commit();
    }

    __device__ void start_sum(Sums& sums, const typename Products::Operand& p, const Place& place) {
      pin(sums);
      wgmma_fence();
      Products::add_by_columns(sums, p, shared_.other.tile(place));
      wgmma_commit();
    }

    // ---- elements -----------------------------------------------------------------------------

    /// For each of the lane's two rows, which of the other side's it sees, or is seen by.
    __device__ void load_words(const Work& work, const ConsumerWalk& walk,
                               const TileNote<kGrad>& note) {
      const std::int32_t mask = walk.mask();
      std::uint64_t live = ~std::uint64_t{0};
      if constexpr (kByRows) live = note.keys;
      masked_ = any_lane(mask >= 0 || live != ~std::uint64_t{0} || (!kByRows && !all_count_));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        words_[half] = mask < 0  ? live
                       : kByRows ? work.pass->masks_of_rows[mask][row(half)] & live
                                 : work.pass->masks[mask][row(half)];
        if (!kByRows && !counts_[half]) words_[half] = 0;
      }
    }

    /// S -> P = exp(S - lse), 0 where masked.
    __device__ void probabilities(const TileNote<kGrad>& lse) {
      if (masked_) mask_rows(s_, words_);
#pragma unroll
      for (int n = 0; n < kMaxTile / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float of_row;
          if constexpr (kByRows) {
            of_row = lse_[i / 2];
          } else {
            of_row = lse.rows[fragment_column(n, i)];
          }
          s_[n][i] = exp2_approx(fmaf(s_[n][i], scale_, -of_row));
        }
      }
    }

    /// dP -> dS = P (dP - delta). The scale waits for the sum.
    __device__ void logit_gradients(const TileNote<kGrad>& delta) {
#pragma unroll
      for (int n = 0; n < kMaxTile / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float of_row;
          if constexpr (kByRows) {
            of_row = delta_[i / 2];
          } else {
            of_row = delta.rows[fragment_column(n, i)];
          }
          float p;
          if constexpr (kKeepsP) {
            p = s_[n][i];
          } else {
            p = Fragments<S>::element(p_[n / 2], n % 2, i);
          }
          dp_[n][i] = p * (dp_[n][i] - of_row);
        }
      }
    }

    // ---- results ------------------------------------------------------------------------------

    __device__ void write(const Work& work) {
      const auto scale = static_cast<float>(a_.call.scale);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!work.owns(consumer_, row(half))) continue;
        const auto sink = [&](const Gradient& to, void* slots, std::int64_t size) {
          return GradientSink<S>(a_, work, to, slots, consumer_, row(half), static_cast<int>(size));
        };
        // A query without keys gets 0 even if a value that it does not see is NaN.
        const bool is_dead = kByRows && lse_[half] == kInfinity;
        write_row(sink(kByRows ? a_.grad_query : a_.grad_key, a_.slots_key, a_.call.head_dim),
                  sum_x_, half, is_dead ? 0.0f : scale, static_cast<int>(a_.call.head_dim));
        if (kByRows) continue;
        write_row(sink(a_.grad_value, a_.slots_value, a_.call.value_dim), sum_y_, half, 1.0f,
                  static_cast<int>(a_.call.value_dim));
      }
    }

    const Arguments& a_;
    const Sm90Arguments& all_;
    const Shared& shared_;
    const int consumer_, warp_row_;
    const float scale_;
    Place place_;
    OwnPlace own_place_;
    const char* own_x_ = nullptr;
    const char* own_y_ = nullptr;
    Logits s_, dp_;
    typename Products::Operand p_, ds_;
    Sums sum_x_, sum_y_;
    float lse_[2], delta_[2];
    bool counts_[2], all_count_;
    std::uint64_t words_[2];
    bool masked_;
  };
};

}  // namespace sparse_attn::cuda
