// Products of a warp that are under way: its 16 of a warpgroup's 64 rows.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "host/descriptors.h"
#include "host/numbers.h"

namespace sparse_attn::cuda::emulator {

/// What a lane says with one instruction: d = a b, or d += a b.
struct Wgmma {
  const char* name;  // says type and columns
  float (*element)(std::uint32_t bits);
  int columns;
  Major major;  // of b
  bool add;
  float* d;
  const std::uint32_t* registers;  // of a; if null, it is in shared memory
  std::uint64_t a, b;              // descriptors
};

inline bool is_same(const Wgmma& x, const Wgmma& y) {
  return std::strcmp(x.name, y.name) == 0 && x.major == y.major && x.add == y.add && x.a == y.a &&
         x.b == y.b && (x.registers == nullptr) == (y.registers == nullptr);
}

class WarpProducts {
 public:
  /// `warp` of its warpgroup.
  WarpProducts(int warp, std::uint64_t draws) : warp_(warp), random_(draws) {}

  void fence() { is_fenced_ = true; }

  /// Operands in shared memory are read now or when the product lands: they must be there, and
  /// stay.
  void issue(void* const (&lanes)[kWarp]) {
    const Wgmma& which = at(lanes, 0);
    for (int lane = 1; lane < kWarp; ++lane) {
      if (!is_same(at(lanes, lane), which))
        fail(std::string("lanes of a warp disagree on the operands of a ") + which.name);
    }
    if (!is_fenced_)
      fail(std::string(which.name) + " without a wgmma_fence since the warp last waited, or began");
    Product product{which, committed_, &take_sums(lanes), take_operands(), false};
    if (which.registers != nullptr) product.operands->read_registers(lanes);
    if (random_.below(2) == 0) read_shared(product);
    ++product.sums->products;
    under_way_.push_back(std::move(product));
  }

  void commit() { ++committed_; }

  /// Lands all groups but the last `pending`.
  void wait(int pending) {
    if (!under_way_.empty() && under_way_.back().group == committed_)
      fail("wgmma_wait while there are products that are not committed");
    while (!under_way_.empty() && under_way_.front().group < committed_ - pending) {
      land(under_way_.front());
      under_way_.pop_front();
    }
    is_fenced_ = false;
  }

  void check_done() const {
    if (!under_way_.empty())
      fail("the kernel ends with " + std::to_string(under_way_.size()) +
           " products of a warp that nobody waited for");
  }

 private:
  static constexpr int kRows = 16, kDepth = 16, kTile = 8, kMostTiles = 16;
  static constexpr std::uint32_t kUnderWay = 0x7fd5a5a5;  // a NaN: what sums are until they land
  using Row __attribute__((vector_size(kTile * sizeof(float)))) = float;

  struct Operands {
    float a[kRows][kDepth];
    Row b[kDepth][kMostTiles];

    void read_registers(void* const (&lanes)[kWarp]) {
      for (int lane = 0; lane < kWarp; ++lane) {
        for (int i = 0; i < 8; ++i) {
          const std::uint32_t bits = at(lanes, lane).registers[i / 2] >> 16 * (i % 2) & 0xffff;
          a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i / 4 * 8 + i % 2] =
              at(lanes, lane).element(bits);
        }
      }
    }
    void read_a(const Wgmma& which, int first_row) {
      const SharedMatrix matrix(which.a);
      std::uint16_t chunk[8];
      for (int m = 0; m < kRows; ++m) {
        for (int k = 0; k < kDepth; ++k) {
          if (k % 8 == 0) matrix.read_row(first_row + m, k / 8, chunk);
          a[m][k] = which.element(chunk[k % 8]);
        }
      }
    }
    void read_b(const Wgmma& which) {
      const SharedMatrix matrix(which.b);
      const bool along_depth = which.major == Major::kDepth;
      std::uint16_t chunk[8];
      for (int i = 0; i < which.columns * kDepth / 8; ++i) {
        const int column = along_depth ? i / 2 : i / kDepth * 8;
        const int depth = along_depth ? i % 2 * 8 : i % kDepth;
        if (along_depth) {
          matrix.read_row(column, i % 2, chunk);
          for (int e = 0; e < 8; ++e)
            b[depth + e][column / kTile][column % kTile] = which.element(chunk[e]);
        } else {
          matrix.read_other(depth, i / kDepth, chunk);
          for (int e = 0; e < 8; ++e) b[depth][column / kTile][e] = which.element(chunk[e]);
        }
      }
    }
  };

  /// Of one d, which belongs to the products until the last of them has landed.
  struct Sums {
    float* d[kWarp];
    int tiles;
    int products = 0;
    Row rows[kRows][kMostTiles] = {};
  };

  struct Product {
    Wgmma which;
    int group;
    Sums* sums;
    std::unique_ptr<Operands> operands;
    bool is_read;
  };

  static Wgmma& at(void* const (&lanes)[kWarp], int lane) {
    return *static_cast<Wgmma*>(lanes[lane]);
  }
  /// The place in d of row `row`, column `column` of tile 0, and whose it is.
  template <class Use>
  static void for_each(const Sums& sums, Use use) {
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int i = 0; i < 4 * sums.tiles; ++i)
        use(sums.d[lane][i], lane / 4 + i % 4 / 2 * 8, i / 4, lane % 4 * 2 + i % 2);
    }
  }

  Sums& take_sums(void* const (&lanes)[kWarp]) {
    const Wgmma& which = at(lanes, 0);
    for (Sums& sums : sums_) {
      if (sums.d[0] != which.d) continue;
      if (sums.tiles != which.columns / kTile)
        fail(std::string(which.name) + " on sums of another size that are under way");
      return sums;
    }
    Sums& sums = sums_.emplace_back();
    sums.tiles = which.columns / kTile;
    for (int lane = 0; lane < kWarp; ++lane) sums.d[lane] = at(lanes, lane).d;
    for_each(sums, [&](float& d, int row, int tile, int column) {
      sums.rows[row][tile][column] = d;
      std::memcpy(&d, &kUnderWay, sizeof(d));
    });
    return sums;
  }

  /// Fresh ones for every product take more time than the product.
  std::unique_ptr<Operands> take_operands() {
    if (spare_.empty()) return std::make_unique<Operands>();
    std::unique_ptr<Operands> operands = std::move(spare_.back());
    spare_.pop_back();
    return operands;
  }

  static void check_untouched(const Sums& sums) {
    for_each(sums, [](float& d, int, int, int) {
      if (bits_of(d) != kUnderWay) fail("sums were touched while a product was under way");
    });
  }

  void read_shared(Product& product) const {
    if (product.which.registers == nullptr) product.operands->read_a(product.which, warp_ * kRows);
    product.operands->read_b(product.which);
    product.is_read = true;
  }

  void land(Product& product) {
    if (!product.is_read) read_shared(product);
    multiply(product);
    spare_.push_back(std::move(product.operands));
    Sums& sums = *product.sums;
    if (--sums.products > 0) return;
    check_untouched(sums);
    for_each(sums,
             [&](float& d, int row, int tile, int column) { d = sums.rows[row][tile][column]; });
    sums_.remove_if([&](const Sums& of) { return &of == &sums; });
  }

  /// Products are exact in float; sums are rounded to it. Sanitizers have nothing to find here, and
  /// take 5 times as long.
  __attribute__((no_sanitize("address", "undefined"))) static void multiply(
      const Product& product) {
    const Operands& operands = *product.operands;
    for (int m = 0; m < kRows; ++m) {
      for (int tile = 0; tile < product.sums->tiles; ++tile) {
        Row sum = product.sums->rows[m][tile];
        if (!product.which.add) sum = Row{};
        for (int k = 0; k < kDepth; ++k) sum += operands.a[m][k] * operands.b[k][tile];
        product.sums->rows[m][tile] = sum;
      }
    }
  }

  int warp_;
  Random random_;
  bool is_fenced_ = false;
  int committed_ = 0;
  std::list<Sums> sums_;
  std::deque<Product> under_way_;
  std::vector<std::unique_ptr<Operands>> spare_;
};

}  // namespace sparse_attn::cuda::emulator
