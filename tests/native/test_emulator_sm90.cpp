// The instructions of sm_90a on the device emulator, as test_emulator.cpp has the others: each
// against its definition, the rules, and planted mistakes. Built once for each executor.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "emulator/planted_pipeline.h"
#include "emulator_case.h"
#include "random_patterns.h"
#include "scalar_types.h"

namespace {

using namespace emulator_case;
using sparse_attn::DataType;

constexpr int kTileBytes = 64 * 128;

MBarrier* barriers(int byte) { return reinterpret_cast<MBarrier*>(shared_memory() + byte); }

std::uint16_t narrow(double x, const HalfFormat& format = kBFloat16Format) {
  return double_to_half(x, format);
}

/// Storage aligned as torch's is.
template <class T>
class Aligned {
 public:
  explicit Aligned(std::size_t count) : storage_(count + 64 / sizeof(T)) {
    const auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
    first_ = (64 - address % 64) % 64 / sizeof(T);
  }
  T* data() { return storage_.data() + first_; }
  T& operator[](std::int64_t i) { return data()[i]; }

 private:
  std::vector<T> storage_;
  std::size_t first_;
};

// ---- threads ------------------------------------------------------------------------------------

void test_any_lane() {
  std::vector<int> wrong(64);
  run_threads<64>([&](int thread) {
    for (int which = 0; which < 64; ++which)
      wrong[at(thread)] += any_lane(thread == which) != (which / 32 == thread / 32);
    lower_registers<24>();
    raise_registers<240>();
  });
  for (const int count : wrong) CHECK_EQUAL(count, 0);
}

/// Pairs of warps, each with a barrier of its own, and all four at times.
void test_sync_some() {
  std::vector<int> wrong(128);
  constexpr int kRounds = 10;
  run_threads<128, kRounds * 128 * sizeof(int)>([&](int thread) {
    const int group = thread / 64;
    for (int round = 0; round < kRounds; ++round) {
      int* values = shared<int>() + round * 128;
      values[thread] = thread + round;
      const bool all = round % 4 == 3;
      all ? sync_some(15, 128) : sync_some(1 + group, 64);
      const int other = all ? (thread + 37) % 128 : group * 64 + (thread + 37) % 64;
      wrong[at(thread)] += values[other] != other + round;
    }
  });
  for (const int count : wrong) CHECK_EQUAL(count, 0);
}

// ---- mbarriers ----------------------------------------------------------------------------------

/// Three threads write, all read: two barriers that take turns.
void test_mbarrier() {
  constexpr int kRounds = 7;
  std::vector<int> wrong(64);
  run_threads<64, 64 + 2 * 3 * sizeof(int)>([&](int thread) {
    MBarrier* written = barriers(0);
    MBarrier* read = barriers(8);
    int* values = reinterpret_cast<int*>(shared_memory() + 64);
    if (thread == 40) {
      init(written, 3);
      init(read, 64);
      fence_barriers();
    }
    sync_threads();
    wait(written, 1);  // the phase before the first
    sync_threads();
    for (unsigned round = 0; round < kRounds; ++round) {
      if (thread % 20 == 3 && thread < 60) {
        wait(read, round % 2 ^ 1);
        values[thread / 20] = thread + static_cast<int>(round);
        arrive(written);
      }
      wait(written, round % 2);
      for (int i = 0; i < 3; ++i)
        wrong[at(thread)] += values[i] != 20 * i + 3 + static_cast<int>(round);
      arrive(read);
    }
  });
  for (const int count : wrong) CHECK_EQUAL(count, 0);
}

// ---- copies of tiles ----------------------------------------------------------------------------

struct Tensor {
  std::int64_t batch, heads, tokens, columns, row_stride, head_stride, batch_stride;
};

struct LoadArguments {
  TensorMap map;
  int at[5];
  std::uint16_t* out;
};

struct LoadKernel {
  static constexpr int kThreads = 32, kBlocksPerSM = 1, kSharedBytes = 2 * kTileBytes + 8;

  static void run(const LoadArguments& arguments) {
    MBarrier* barrier = barriers(2 * kTileBytes);
    if (threadIdx.x == 0) {
      init(barrier, 1);
      fence_barriers();
    }
    sync_warp();
    if (threadIdx.x == 9) {
      prefetch(&arguments.map);
      tma_load(shared_memory() + kTileBytes, &arguments.map, barrier, arguments.at);
      arrive_expecting(barrier, kTileBytes);
    }
    wait(barrier, 0);
    if (threadIdx.x == 0) std::memcpy(arguments.out, shared_memory() + kTileBytes, kTileBytes);
  }
};

/// Elements are numbers of their own; whatever is not in the tensor is a NaN.
void check_load(Random& random, const Tensor& tensor, std::int64_t step) {
  const std::int64_t count = tensor.batch * tensor.batch_stride;
  Aligned<std::uint16_t> data(static_cast<std::size_t>(count));
  std::fill_n(data.data(), count, std::uint16_t{0x7fff});
  const auto place = [&](std::int64_t b, std::int64_t h, std::int64_t token, std::int64_t column) {
    return b * tensor.batch_stride + h * tensor.head_stride + token * tensor.row_stride + column;
  };
  const auto value = [](std::int64_t i) { return static_cast<std::uint16_t>(1 + i % 30000); };
  for (std::int64_t b = 0; b < tensor.batch; ++b) {
    for (std::int64_t h = 0; h < tensor.heads; ++h) {
      for (std::int64_t t = 0; t < tensor.tokens; ++t) {
        for (std::int64_t c = 0; c < tensor.columns; ++c)
          data[place(b, h, t, c)] = value(place(b, h, t, c));
      }
    }
  }
  sparse_attn::TensorView view{data.data(), tensor.batch_stride, tensor.head_stride,
                               tensor.row_stride};
  std::uint16_t out[64][8][8];
  LoadArguments arguments{make_tensor_map({view, DataType::kBFloat16, tensor.batch, tensor.heads,
                                           tensor.tokens, tensor.columns},
                                          step),
                          {},
                          out[0][0]};
  const auto one_of = [&](std::int64_t from, std::int64_t to) {
    return static_cast<int>(random.between(from, to));
  };
  const std::int64_t of_class = tensor.tokens / step;
  const int at[5] = {one_of(-70, tensor.columns + 6), one_of(-1, step), one_of(-70, of_class + 6),
                     one_of(-1, tensor.heads), one_of(-1, tensor.batch)};
  std::copy(at, at + 5, arguments.at);
  emulator::run<LoadKernel>(1, arguments);
  const bool inside = at[1] >= 0 && at[1] < step && at[3] >= 0 && at[3] < tensor.heads &&
                      at[4] >= 0 && at[4] < tensor.batch;
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 64; ++column) {
      const int c = at[0] + column, t = at[2] + row;
      const bool is_there = inside && c >= 0 && c < tensor.columns && t >= 0 && t < of_class;
      const std::uint16_t expected =
          is_there ? value(place(at[4], at[3], at[1] + t * step, c)) : std::uint16_t{0};
      CHECK_EQUAL(out[row][column / 8 ^ row % 8][column % 8], expected);
    }
  }
}

void test_tma_load() {
  Random random(5);
  const Tensor by_heads{2, 3, 150, 80, 88, 88 * 150, 88 * 150 * 3};
  const Tensor by_tokens{2, 3, 150, 64, 3 * 64, 64, 3 * 64 * 150};
  for (int i = 0; i < (kFibers ? 100 : 5); ++i) {
    check_load(random, by_heads, 1 + i % 4);
    check_load(random, by_tokens, 1 + i % 4);
  }
}

void test_tensor_map() {
  Aligned<std::uint16_t> data(64 * 64);
  const auto map = [](void* from, std::int64_t row_stride, std::int64_t head_stride,
                      std::int64_t tokens = 64, DataType type = DataType::kFloat16) {
    return make_tensor_map({{from, 4096, head_stride, row_stride}, type, 1, 1, tokens, 64}, 2);
  };
  map(data.data(), 64, 4096);
  CHECK_THROWS(map(data.data() + 4, 64, 4096), std::runtime_error);
  CHECK_THROWS(map(data.data(), 60, 4096), std::runtime_error);
  CHECK_THROWS(map(data.data(), 64, 4092), std::runtime_error);
  CHECK_THROWS(map(data.data(), 64, std::int64_t{1} << 40), std::runtime_error);
  CHECK_THROWS(map(data.data(), 64, 4096, 1), std::runtime_error);
  CHECK_THROWS(map(data.data(), 64, 4096, 64, DataType::kFloat32), std::runtime_error);
}

// ---- products of a warpgroup --------------------------------------------------------------------

#define PRODUCT(NAME, TYPE, COLUMNS, FORMAT)                                                  \
  struct NAME {                                                                               \
    static constexpr int kColumns = COLUMNS;                                                  \
    static constexpr const HalfFormat& kFormat = FORMAT;                                      \
    template <Major kMajor, class A>                                                          \
    static void multiply(float (&d)[COLUMNS / 8][4], const A& a, std::uint64_t b, bool add) { \
      wgmma_m64n##COLUMNS##k16_##TYPE<kMajor>(d, a, b, add);                                  \
    }                                                                                         \
  }
PRODUCT(BFloat16By64, bf16, 64, kBFloat16Format);
PRODUCT(BFloat16By128, bf16, 128, kBFloat16Format);
PRODUCT(Float16By64, f16, 64, kFloat16Format);
PRODUCT(Float16By128, f16, 128, kFloat16Format);
#undef PRODUCT

constexpr int kDepth = 64;  // four products

/// Where an operand's element is from the start of its tile: by the row of 128 bytes.
int swizzled(int row, int element) {
  return row * 128 + (element / 8 ^ row % 8) * 16 + element % 8 * 2;
}

void store(int byte, std::uint16_t bits) {
  std::memcpy(shared_memory() + byte, &bits, sizeof(bits));
}

/// d = a b or d += a b in whole numbers, b of up to 128 columns given by its columns.
template <class Product>
struct Numbers {
  static constexpr int kColumns = Product::kColumns;

  explicit Numbers(Random& random) {
    const auto fill = [&](auto& rows) {
      for (auto& row : rows) {
        for (float& x : row) x = static_cast<float>(random.between(-8, 8));
      }
    };
    fill(a);
    fill(b);
    fill(d);
  }
  float expected(int m, int n, bool add) const {
    float sum = add ? d[m][n] : 0.0f;
    for (int k = 0; k < kDepth; ++k) sum += a[m][k] * b[n][k];
    return sum;
  }
  static std::uint16_t bits(float x) { return narrow(static_cast<double>(x), Product::kFormat); }

  float a[64][kDepth], b[kColumns][kDepth], d[64][kColumns], got[64][kColumns];
  bool landed_early[kWarpgroup] = {};
};

/// Tiles begin at these bytes; the second piece of a b that lies along the columns does not follow
/// the first at once.
constexpr int kA = 1024, kB = kA + kTileBytes, kPiece = kTileBytes + 2048;

template <class Product, Major kMajor, bool kInRegisters>
struct ProductKernel {
  static constexpr int kThreads = 2 * kWarpgroup, kBlocksPerSM = 1;
  static constexpr int kSharedBytes = kB + kPiece + kTileBytes;
  static constexpr int kTiles = Product::kColumns / 8;
  struct Arguments {
    Numbers<Product>* numbers;
    bool add;
  };

  /// By the second warpgroup.
  static void run(const Arguments& arguments) {
    Numbers<Product>& numbers = *arguments.numbers;
    const int thread = static_cast<int>(threadIdx.x) - kWarpgroup;
    if (thread < 0) {
      sync_threads();
      return;
    }
    write_operands(numbers, thread);
    fence_async();
    sync_threads();
    const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    float d[kTiles][4];
    for (int i = 0; i < 4 * kTiles; ++i)
      d[i / 4][i % 4] = numbers.d[row + i % 4 / 2 * 8][i / 4 * 8 + column + i % 2];
    multiply(numbers, d, row, column, arguments.add);
    for (int i = 0; i < 4 * kTiles; ++i)
      numbers.got[row + i % 4 / 2 * 8][i / 4 * 8 + column + i % 2] = d[i / 4][i % 4];
  }

 private:
  static void write_operands(const Numbers<Product>& numbers, int thread) {
    for (int i = thread; i < 64 * kDepth; i += kWarpgroup)
      store(kA + swizzled(i / kDepth, i % kDepth), numbers.bits(numbers.a[i / kDepth][i % kDepth]));
    for (int i = thread; i < Product::kColumns * kDepth; i += kWarpgroup) {
      const int n = i / kDepth, k = i % kDepth;
      const int byte =
          kMajor == Major::kDepth ? swizzled(n, k) : n / 64 * kPiece + swizzled(k, n % 64);
      store(kB + byte, numbers.bits(numbers.b[n][k]));
    }
  }

  static void multiply(Numbers<Product>& numbers, float (&d)[kTiles][4], int row, int column,
                       bool add) {
    const std::uint64_t of_a = matrix_descriptor(shared_memory() + kA, 0);
    const std::uint64_t of_b = matrix_descriptor(shared_memory() + kB, kPiece);
    std::uint32_t fragments[kDepth / 16][4];
    for (int i = 0; i < kDepth / 4; ++i) {
      const float* pair = &numbers.a[row + i % 2 * 8][i / 4 * 16 + i / 2 % 2 * 8 + column];
      fragments[i / 4][i % 4] = numbers.bits(pair[0]) | std::uint32_t{numbers.bits(pair[1])} << 16;
    }
    wgmma_fence();
    for (int k = 0; k < kDepth / 16; ++k) {
      const std::uint64_t b = advance(of_b, kMajor == Major::kDepth ? 32 * k : 2048 * k);
      if constexpr (kInRegisters) {
        Product::template multiply<kMajor>(d, fragments[k], b, add || k > 0);
      } else {
        Product::template multiply<kMajor>(d, advance(of_a, 32 * k), b, add || k > 0);
      }
      if (k == 1) wgmma_commit();
    }
    wgmma_commit();
    bool landed = !std::isnan(d[0][0]);
    wgmma_wait<1>();
    landed |= !std::isnan(d[kTiles - 1][3]);  // products of the second group add to them yet
    wgmma_wait<0>();
    numbers.landed_early[threadIdx.x - kWarpgroup] = landed;
    pin(d);
  }
};

template <class Product, Major kMajor, bool kInRegisters>
void check_product() {
  Random random(6);
  for (const bool add : {false, true}) {
    using Kernel = ProductKernel<Product, kMajor, kInRegisters>;
    Numbers<Product> numbers(random);
    emulator::run<Kernel>(1, typename Kernel::Arguments{&numbers, add});
    for (const bool landed : numbers.landed_early) CHECK(!landed);
    for (int m = 0; m < 64; ++m) {
      for (int n = 0; n < Product::kColumns; ++n)
        CHECK_EQUAL(numbers.got[m][n], numbers.expected(m, n, add));
    }
  }
}

template <class Product>
void test_products() {
  check::context = std::to_string(Product::kColumns) + " columns";
  check_product<Product, Major::kDepth, false>();
  check_product<Product, Major::kDepth, true>();
  check_product<Product, Major::kOther, false>();
  check_product<Product, Major::kOther, true>();
  check::context.clear();
}

/// The fields of PTX ISA's "Matrix descriptor format".
void test_descriptors() {
  run_threads<32, 227 * 1024>([](int thread) {
    if (thread != 0) return;
    const std::uint64_t first = matrix_descriptor(shared_memory(), 0);
    CHECK_EQUAL(first, std::uint64_t{1} << 62 | std::uint64_t{64} << 32);
    const std::uint64_t last = matrix_descriptor(shared_memory() + 226 * 1024, 16 * 1024);
    CHECK_EQUAL(last, first | 1024u << 16 | 226 * 64u);
    CHECK_EQUAL(advance(first, 96), first + 6);
  });
}

// ---- planted mistakes ---------------------------------------------------------------------------

template <PipelineBug kBug>
bool is_right(std::uint64_t seed) {
  using Kernel = PlantedPipeline<kBug>;
  constexpr int kRows = 64 * Kernel::kTiles, kSize = Kernel::kDepth;
  Random random(4);
  Aligned<std::uint16_t> a(64 * kSize), b(kRows * kSize);
  for (int i = 0; i < 64 * kSize; ++i) a[i] = narrow(static_cast<double>(random.between(-8, 8)));
  for (int i = 0; i < kRows * kSize; ++i) b[i] = narrow(static_cast<double>(random.between(-8, 8)));
  std::vector<float> c(64 * 64, -1.0f);
  const TensorMap map = make_tensor_map(
      {{b.data(), kRows * kSize, kRows * kSize, kSize}, DataType::kBFloat16, 1, 1, kRows, kSize},
      1);
  emulator::set_seed(seed);
  emulator::run<Kernel>(1, PipelineMatrices{map, a.data(), c.data()});
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < 64; ++n) {
      double expected = 0.0;
      for (int i = 0; i < Kernel::kTiles * kSize; ++i) {
        const int row = i / kSize * 64 + n, k = i % kSize;
        expected += half_to_double(a[m * kSize + k], kBFloat16Format) *
                    half_to_double(b[row * kSize + k], kBFloat16Format);
      }
      if (!(static_cast<double>(c[at(m * 64 + n)]) == expected)) return false;
    }
  }
  return true;
}

/// In how many seeds the mistake is found, whether by a wrong number or by a broken rule.
template <PipelineBug kBug>
int found() {
  int count = 0;
  for (int seed = 0; seed < kSeeds; ++seed)
    count += !in_child([&] { return is_right<kBug>(static_cast<unsigned>(seed)); }).passed;
  return count;
}

/// In nearly every order of the fibers, and always in ThreadSanitizer's report, unless a rule was
/// broken before.
template <PipelineBug kBug>
void check_pipeline_race() {
  if (kSeesRaces) {
    const Outcome outcome = in_child([] { return is_right<kBug>(1); });
    CHECK(!outcome.passed);
    CHECK(contains(outcome.errors, "WARNING: ThreadSanitizer: data race") ||
          contains(outcome.errors, "one arrival more than the 1"));
  } else if (kFibers) {
    CHECK(found<kBug>() >= kSeeds - 1);
  }
}

void test_planted_bugs() {
  for (int seed = 0; seed < kSeeds; ++seed)
    CHECK(is_right<PipelineBug::kNone>(static_cast<unsigned>(seed)));
  check_pipeline_race<PipelineBug::kNoWaitForFull>();
  check_pipeline_race<PipelineBug::kNoWaitForEmpty>();
  check_pipeline_race<PipelineBug::kReleasedTooEarly>();
  CHECK_EQUAL(found<PipelineBug::kWrongParity>(), kSeeds);  // threads may wait forever
  CHECK_EQUAL(found<PipelineBug::kReadTooEarly>(), kSeeds);
  CHECK_EQUAL(found<PipelineBug::kNoFence>(), kSeeds);
  CHECK_EQUAL(found<PipelineBug::kWrongSwizzle>(), kSeeds);
  CHECK_EQUAL(found<PipelineBug::kTooFewBytes>(), kSeeds);
}

/// Both arrive, nobody waits: the one is not ordered after the other.
void test_lone_race() {
  if (!kSeesRaces) return;
  const Outcome outcome = in_child([] {
    run_threads<64, 16>([](int thread) {
      int* value = reinterpret_cast<int*>(shared_memory() + 8);
      if (thread == 0) init(barriers(0), 2);
      sync_threads();
      if (thread == 0) *value = 1;
      if (thread % 32 == 0) arrive(barriers(0));
      if (thread == 32 && *value == 2) sync_warp();
    });
    return true;
  });
  CHECK_EQUAL(outcome.exit_code, 66);
}

// ---- broken rules -------------------------------------------------------------------------------

void test_broken_threads() {
  check_dies("sync_some of barrier 16: there are 1 to 15",
             [] { run_threads<64>([](int) { sync_some(16, 64); }); });
  check_dies("sync_some(3) for 40 threads", [] { run_threads<64>([](int) { sync_some(3, 40); }); });
  check_dies("threads here, for ",
             [] { run_threads<128>([](int thread) { sync_some(1, thread < 32 ? 64 : 128); }); });
  check_dies("sync_some(1) by 16 threads of a warp", [] {
    run_threads<96>([](int thread) {
      if (thread % 32 < 16 || thread < 32) sync_some(1, 64);
    });
  });
  check_dies("no thread can go on: 32 at sync_some(2); 32 at the end;", [] {
    run_threads<64>([](int thread) {
      if (thread < 32) sync_some(2, 64);
    });
  });
  check_dies("no thread can go on: 3 at ballot; 29 at the end;", [] {
    run_threads<32>([](int thread) {
      if (thread < 3) any_lane(true);
    });
  });
}

/// By one thread, with barriers at bytes 0 and 8 of which the first is ready for two arrivals.
void check_barrier_dies(const char* words, void (*body)(MBarrier* ready)) {
  check_dies(words, [&] {
    run_threads<32, 64>([&](int thread) {
      if (thread != 7) return;
      init(barriers(0), 2);
      body(barriers(0));
    });
  });
}

void test_broken_barriers() {
  check_barrier_dies("init of the mbarrier at byte 0 a second time",
                     [](MBarrier* ready) { init(ready, 1); });
  check_barrier_dies("init of an mbarrier for 0 arrivals",
                     [](MBarrier* ready) { init(ready + 1, 0); });
  check_barrier_dies("init of an mbarrier at byte 4 of shared memory, which is not aligned",
                     [](MBarrier*) { init(barriers(4), 1); });
  check_barrier_dies("arrive of an mbarrier at byte 64 of shared memory, which has 64 bytes",
                     [](MBarrier*) { arrive(barriers(64)); });
  check_barrier_dies("wait of the mbarrier at byte 8 before its init",
                     [](MBarrier* ready) { wait(ready + 1, 0); });
  check_barrier_dies("arrive of the mbarrier at byte 0 before its init, or something was stored",
                     [](MBarrier* ready) {
                       std::memset(static_cast<void*>(ready), 0, sizeof(*ready));
                       arrive(ready);
                     });
  check_barrier_dies("one arrival more than the 2 that the mbarrier at byte 0 expects",
                     [](MBarrier* ready) {
                       arrive_expecting(ready, 16);
                       arrive(ready);
                       arrive(ready);
                     });
  check_barrier_dies("wait for parity 2", [](MBarrier* ready) { wait(ready, 2); });
  check_barrier_dies("cannot count 1048576 bytes",
                     [](MBarrier* ready) { arrive_expecting(ready, 1 << 20); });
  check_barrier_dies("the kernel ends while the mbarrier at byte 0 expects 16 bytes",
                     [](MBarrier* ready) { arrive_expecting(ready, 16); });
  check_barrier_dies("no thread can go on: 31 at the end; 1 at wait(the mbarrier at byte 0, 0);",
                     [](MBarrier* ready) { wait(ready, 0); });
}

/// By one thread; the map is a parameter of the grid.
template <class Body>
void check_load_dies(const char* words, Body body) {
  Aligned<std::uint16_t> data(64 * 64);
  const TensorMap map =
      make_tensor_map({{data.data(), 4096, 4096, 64}, DataType::kBFloat16, 1, 1, 64, 64}, 1);
  check_dies(words, [&] {
    run_threads<32, 2 * kTileBytes + 1024>([map, body](int thread) {
      if (thread != 7) return;
      MBarrier* barrier = barriers(2 * kTileBytes);
      init(barrier, 1);
      body(&map, barrier);
    });
  });
}

void test_broken_loads() {
  check_load_dies("tma_load at byte 512 of shared memory, which is not aligned to 1024 bytes",
                  [](const TensorMap* map, MBarrier* barrier) {
                    tma_load(shared_memory() + 512, map, barrier, {});
                  });
  check_load_dies("tma_load at byte 16384 of shared memory, which has 17408 bytes",
                  [](const TensorMap* map, MBarrier* barrier) {
                    tma_load(shared_memory() + 2 * kTileBytes, map, barrier, {});
                  });
  check_load_dies("the map is not a parameter of the grid",
                  [](const TensorMap* map, MBarrier* barrier) {
                    const TensorMap copied = *map;
                    tma_load(shared_memory(), &copied, barrier, {});
                  });
  check_load_dies("tma_load of the mbarrier at byte 16392 before its init",
                  [](const TensorMap* map, MBarrier* barrier) {
                    tma_load(shared_memory(), map, barrier + 1, {});
                  });
  check_load_dies("the kernel ends with a tma_load that nobody waited for",
                  [](const TensorMap* map, MBarrier* barrier) {
                    arrive_expecting(barrier, kTileBytes);
                    tma_load(shared_memory(), map, barrier, {});
                  });
  check_load_dies("the bytes of a tma_load come after their phase of the mbarrier at byte 16384",
                  [](const TensorMap* map, MBarrier* barrier) {
                    arrive_expecting(barrier, kTileBytes);
                    tma_load(shared_memory(), map, barrier, {});
                    tma_load(shared_memory() + kTileBytes, map, barrier, {});
                    wait(barrier, 0);
                    wait(barrier, 1);
                  });
  check_dies("no map that make_tensor_map made", [] {
    run_threads<32, kTileBytes + 8>([map = TensorMap{}](int thread) {
      if (thread == 0) tma_load(shared_memory(), &map, barriers(kTileBytes), {});
    });
  });
}

using Sums = float[8][4];

/// By a warpgroup, with operands of zeros in the first two tiles.
void check_product_dies(const char* words,
                        void (*body)(int thread, Sums& d, std::uint64_t a, std::uint64_t b)) {
  check_dies(words, [&] {
    run_threads<kWarpgroup, 2 * kTileBytes>([&](int thread) {
      for (int i = thread; i < 2 * kTileBytes / 4; i += kWarpgroup) shared<float>()[i] = 0.0f;
      fence_async();
      sync_threads();
      Sums d = {};
      body(thread, d, matrix_descriptor(shared_memory(), 0),
           matrix_descriptor(shared_memory() + kTileBytes, 0));
    });
  });
}

constexpr auto kMultiply = static_cast<void (*)(Sums&, std::uint64_t, std::uint64_t, bool)>(
    wgmma_m64n64k16_bf16<Major::kDepth>);

/// As it should be.
void multiply_and_wait(Sums& d, std::uint64_t a, std::uint64_t b) {
  wgmma_fence();
  kMultiply(d, a, b, true);
  wgmma_commit();
  wgmma_wait<0>();
}

void test_broken_products() {
  check_product_dies("wgmma_m64n64k16_bf16 without a wgmma_fence since the warp last waited",
                     [](int, Sums& d, std::uint64_t a, std::uint64_t b) {
                       multiply_and_wait(d, a, b);
                       kMultiply(d, a, b, true);
                     });
  check_product_dies("wgmma_wait while there are products that are not committed",
                     [](int, Sums& d, std::uint64_t a, std::uint64_t b) {
                       wgmma_fence();
                       kMultiply(d, a, b, true);
                       wgmma_wait<0>();
                     });
  check_product_dies("the kernel ends with 1 products of a warp that nobody waited for",
                     [](int, Sums& d, std::uint64_t a, std::uint64_t b) {
                       multiply_and_wait(d, a, b);
                       wgmma_fence();
                       kMultiply(d, a, b, true);
                       wgmma_commit();
                       wgmma_wait<1>();
                     });
  check_product_dies("sums were touched while a product was under way",
                     [](int thread, Sums& d, std::uint64_t a, std::uint64_t b) {
                       wgmma_fence();
                       kMultiply(d, a, b, true);
                       wgmma_commit();
                       if (thread == 77) d[3][1] *= 2.0f;
                       if (thread == 78) d[3][1] = 0.0f;
                       wgmma_wait<0>();
                     });
  check_product_dies("the warps of a warpgroup differ: wgmma_",
                     [](int thread, Sums& d, std::uint64_t a, std::uint64_t b) {
                       wgmma_fence();
                       kMultiply(d, a, b, thread < 64);
                       wgmma_commit();
                       wgmma_wait<0>();
                     });
  check_product_dies("the warps of a warpgroup differ: some end without wgmma_fence(0)",
                     [](int thread, Sums& d, std::uint64_t a, std::uint64_t b) {
                       if (thread < 96) multiply_and_wait(d, a, b);
                     });
  check_product_dies("lanes of a warp disagree on the operands of a wgmma_m64n64k16_bf16",
                     [](int thread, Sums& d, std::uint64_t a, std::uint64_t b) {
                       multiply_and_wait(d, a, thread == 5 ? advance(b, 32) : b);
                     });
  check_product_dies("of which a field has overflown",
                     [](int, Sums& d, std::uint64_t a, std::uint64_t b) {
                       multiply_and_wait(d, advance(a, 1 << 18), b);
                     });
  check_product_dies("wgmma at byte 16384 of shared memory, which has 16384 bytes",
                     [](int, Sums& d, std::uint64_t a, std::uint64_t b) {
                       multiply_and_wait(d, a, advance(b, kTileBytes));
                     });
  check_product_dies("wgmma of a matrix at byte 8320 of shared memory, which is not in the first",
                     [](int, Sums& d, std::uint64_t a, std::uint64_t b) {
                       multiply_and_wait(d, a, advance(b, 128));
                     });
  check_product_dies("a descriptor advanced by 8 bytes",
                     [](int, Sums&, std::uint64_t a, std::uint64_t) { advance(a, 8); });
  check_product_dies(
      "matrix_descriptor at byte 8 of shared memory, which is not aligned",
      [](int, Sums&, std::uint64_t, std::uint64_t) { matrix_descriptor(shared_memory() + 8, 0); });
  check_dies("wgmma_fence by a warpgroup of fewer than four warps",
             [] { run_threads<96>([](int) { wgmma_fence(); }); });
}

/// What cp.async has brought, the thread that waited for it has to fence.
void test_proxies() {
  alignas(16) static const Bytes16 zeros = {};
  const auto copy_and_multiply = [](bool fence) {
    run_threads<kWarpgroup, 2 * kTileBytes>([&](int thread) {
      for (int i = thread; i < 2 * kTileBytes / 16; i += kWarpgroup)
        cp_async_16(shared_memory() + 16 * i, &zeros, true);
      cp_async_commit();
      cp_async_wait<0>();
      if (fence || thread != 100) fence_async();
      sync_threads();
      Sums d = {};
      multiply_and_wait(d, matrix_descriptor(shared_memory(), 0),
                        matrix_descriptor(shared_memory() + kTileBytes, 0));
    });
  };
  copy_and_multiply(true);
  check_dies("read by wgmma without fence_async", [&] { copy_and_multiply(false); });
}

}  // namespace

int main() {
  test_any_lane();
  test_sync_some();
  test_mbarrier();
  test_tma_load();
  test_tensor_map();
  test_descriptors();
  test_products<BFloat16By64>();
  test_products<BFloat16By128>();
  test_products<Float16By64>();
  test_products<Float16By128>();
  test_planted_bugs();
  test_lone_race();
  test_broken_threads();
  test_broken_barriers();
  test_broken_loads();
  test_broken_products();
  test_proxies();
  return check::report();
}
