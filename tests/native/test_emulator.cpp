// The device emulator: every instruction against its definition, and that planted mistakes are
// found. Built once for each executor; see emulator/README.md.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "emulator/planted_kernel.h"
#include "emulator_case.h"
#include "random_patterns.h"
#include "scalar_types.h"

namespace {

using namespace emulator_case;

// ---- numbers ------------------------------------------------------------------------------------

void check_narrow(float x) {
  check::context = "float " + std::to_string(x);
  const auto wide = static_cast<double>(x);
  const std::uint32_t bf16 = std::isnan(x) ? 0x7fff : double_to_half(wide, kBFloat16Format);
  const std::uint32_t f16 = std::isnan(x) ? 0x7fff : double_to_half(wide, kFloat16Format);
  CHECK_EQUAL(pack_bf16(x, 1.0f), bf16 | 0x3f800000);
  CHECK_EQUAL(pack_bf16(1.0f, x), bf16 << 16 | 0x3f80);
  CHECK_EQUAL(pack_f16(x, 1.0f), f16 | 0x3c000000);
  CHECK_EQUAL(pack_f16(1.0f, x), f16 << 16 | 0x3c00);
  CHECK_EQUAL(float_to_f16(x), f16);
}

/// Halves away from zero, as std::round has them.
void check_tf32(float x) {
  const double unit = std::ldexp(1.0, std::max(std::ilogb(x), -126) - 10);
  const auto expected = static_cast<float>(std::round(static_cast<double>(x) / unit) * unit);
  CHECK_EQUAL(float_from_bits(to_tf32(x)), expected);
}

void test_conversions() {
  for (int bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const double x = half_to_double(half, kFloat16Format);
    const float got = f16_to_float(half);
    CHECK(std::isnan(x) ? std::isnan(got) : static_cast<double>(got) == x);
    CHECK_EQUAL(std::signbit(got), (bits & 0x8000) != 0);
    for (const HalfFormat& format : {kFloat16Format, kBFloat16Format}) {
      const double from = half_to_double(half, format);
      const double next = half_to_double(static_cast<std::uint16_t>(half + 1), format);
      const auto middle = static_cast<float>(std::isfinite(next) ? (from + next) / 2 : 65520.0);
      for (const float y : {middle, std::nextafter(middle, -INFINITY),
                            std::nextafter(middle, INFINITY), static_cast<float>(from)})
        check_narrow(y);
    }
  }
  Random random(1);
  for (int i = 0; i < 100000; ++i) {
    const float x = float_from_bits(static_cast<std::uint32_t>(random.word()));
    check_narrow(x);
    if (!std::isfinite(x) || x == 0.0f) continue;
    check_tf32(x);
    check_tf32(float_from_bits((emulator::bits_of(x) & ~0x1fffu) | 0x1000));  // a half
  }
  check::context.clear();
  CHECK(std::isnan(float_from_bits(to_tf32(NAN))));
  CHECK_EQUAL(float_from_bits(to_tf32(-INFINITY)), -INFINITY);
}

void test_exp2() {
  Random random(2);
  for (int i = 0; i < 100000; ++i) {
    const auto x = static_cast<float>(126.0 * random.real());
    const double exact = std::exp2(static_cast<double>(x));
    CHECK(std::fabs(static_cast<double>(exp2_approx(x)) - exact) <= 0x1p-22 * exact);
  }
  for (const float x : {-INFINITY, -127.0f, -1e30f}) CHECK_EQUAL(exp2_approx(x), 0.0f);
  CHECK_EQUAL(exp2_approx(1e-40f), 1.0f);
  CHECK_EQUAL(exp2_approx(200.0f), INFINITY);
  CHECK(std::isnan(exp2_approx(NAN)));
}

// ---- threads ------------------------------------------------------------------------------------

void test_indices() {
  std::vector<unsigned> seen(3 * 96);
  run_threads<96>(
      [&](int) { seen[blockIdx.x * blockDim.x + threadIdx.x] = 1 + 100 * blockDim.x + gridDim.x; },
      3);
  for (const unsigned value : seen) CHECK_EQUAL(value, 1 + 100 * 96u + 3);
}

/// Fresh shared memory is aligned, and NaN in every type.
void test_shared_memory() {
  constexpr int kBytes = 1024;
  run_threads<32, kBytes>([](int thread) {
    if (thread != 0) return;
    CHECK_EQUAL(reinterpret_cast<std::uintptr_t>(shared_memory()) % 1024, 0u);
    for (int i = 0; i < kBytes / 8; ++i) CHECK(std::isnan(shared<double>()[i]));
    for (int i = 0; i < kBytes / 4; ++i) CHECK(std::isnan(shared<float>()[i]));
    for (int i = 0; i < kBytes / 2; ++i) {
      CHECK(std::isnan(f16_to_float(shared<std::uint16_t>()[i])));
      CHECK(std::isnan(half_to_double(shared<std::uint16_t>()[i], kBFloat16Format)));
    }
  });
}

void test_barriers() {
  std::vector<int> wrong(128);
  run_threads<128, 2 * 128 * sizeof(int)>([&](int thread) {
    for (int round = 0; round < 10; ++round) {
      int* values = shared<int>() + round % 2 * 128;
      values[thread] = thread + round;
      const bool any = sync_threads_or(round % 3 == 0 && thread == 7 * round);
      const int other = (thread + 37) % 128;
      wrong[at(thread)] += values[other] != other + round || any != (round % 3 == 0);
    }
    sync_threads();
    shared<int>()[thread] = -thread;
    sync_threads();
    wrong[at(thread)] += shared<int>()[127 - thread] != thread - 127;
  });
  for (const int count : wrong) CHECK_EQUAL(count, 0);
}

template <class T>
void test_shuffle() {
  std::vector<T> got(32 * 64);
  run_threads<64>([&](int thread) {
    for (int mask = 0; mask < 32; ++mask)
      got[at(mask * 64 + thread)] = shuffle_xor(static_cast<T>(3 * thread), mask);
  });
  for (int mask = 0; mask < 32; ++mask) {
    for (int thread = 0; thread < 64; ++thread)
      CHECK_EQUAL(got[at(mask * 64 + thread)], static_cast<T>(3 * (thread ^ mask)));
  }
}

// ---- memory -------------------------------------------------------------------------------------

bool is_garbage(const Bytes16& bytes) {
  return std::isnan(float_from_bits(bytes.words[0])) && std::isnan(float_from_bits(bytes.words[3]));
}

/// Three groups of one copy each, and one that is not valid: each lands at its own wait.
void test_cp_async() {
  alignas(16) const Bytes16 global[3] = {{{1, 2, 3, 4}}, {{5, 6, 7, 8}}, {{9, 10, 11, 12}}};
  run_threads<32, 3 * sizeof(Bytes16)>([&](int thread) {
    if (thread != 5) return;
    auto* to = shared<Bytes16>();
    std::memset(to, 0, 3 * sizeof(Bytes16));
    for (int i = 0; i < 3; ++i) {
      cp_async_16(to + i, i == 1 ? nullptr : global + i, i != 1);
      CHECK(is_garbage(to[i]));
      cp_async_commit();
    }
    cp_async_wait<3>();
    CHECK(is_garbage(to[0]));
    cp_async_wait<2>();
    CHECK_EQUAL(to[0].words[3], 4u);
    CHECK(is_garbage(to[1]));
    cp_async_wait<1>();
    for (const std::uint32_t word : to[1].words) CHECK_EQUAL(word, 0u);
    CHECK(is_garbage(to[2]));
    cp_async_wait<0>();
    for (int i = 0; i < 4; ++i) CHECK_EQUAL(to[2].words[i], global[2].words[i]);
    cp_async_16(to, global + 2, true);
    cp_async_wait<0>();
    CHECK(is_garbage(to[0]));  // its group is not closed
    cp_async_commit();
    cp_async_wait<0>();
    CHECK_EQUAL(to[0].words[0], 9u);
  });
}

/// Element c of row r of matrix m is 64 m + 8 r + c.
void test_ldmatrix() {
  std::vector<std::uint32_t> plain(128), transposed(128);
  run_threads<32, 4 * 64 * 2>([&](int lane) {
    for (int i = lane; i < 4 * 64; i += 32) shared<std::uint16_t>()[i] = static_cast<uint16_t>(i);
    sync_threads();
    std::uint32_t d[4];
    ldmatrix_x4(d, shared_memory() + 16 * lane);
    for (int m = 0; m < 4; ++m) plain[at(32 * m + lane)] = d[m];
    ldmatrix_x4_trans(d, shared_memory() + 16 * lane);
    for (int m = 0; m < 4; ++m) transposed[at(32 * m + lane)] = d[m];
  });
  for (int i = 0; i < 128; ++i) {
    const int first = i / 32 * 64, line = i % 32 / 4, place = i % 4 * 2;
    const int row_wise = first + 8 * line + place, column_wise = first + 8 * place + line;
    CHECK_EQUAL(plain[at(i)], static_cast<unsigned>(row_wise | (row_wise + 1) << 16));
    CHECK_EQUAL(transposed[at(i)], static_cast<unsigned>(column_wise | (column_wise + 8) << 16));
  }
}

// ---- tensor cores -------------------------------------------------------------------------------

struct BFloat16Product {
  using Element = std::uint16_t;
  static constexpr int kDepth = 16;
  static Element narrow(float x) { return double_to_half(static_cast<double>(x), kBFloat16Format); }
  static constexpr auto kMultiply = mma_m16n8k16_bf16;
};
struct Float16Product {
  using Element = std::uint16_t;
  static constexpr int kDepth = 16;
  static Element narrow(float x) { return double_to_half(static_cast<double>(x), kFloat16Format); }
  static constexpr auto kMultiply = mma_m16n8k16_f16;
};
/// With garbage in the 13 bits that do not count.
struct TF32Product {
  using Element = float;
  static constexpr int kDepth = 8;
  static Element narrow(float x) { return float_from_bits(emulator::bits_of(x) | 0x1fff); }
  static constexpr auto kMultiply = mma_m16n8k8_tf32;
};

/// d += a bᵀ in whole numbers. Rows of 32 bytes, which ldmatrix takes in two chunks, of 16 bits or
/// of 32: a 32-bit element of fragment row g is the pair of 16-bit ones 2t and 2t + 1.
template <class Product>
void test_product() {
  using Element = typename Product::Element;
  constexpr int kDepth = Product::kDepth;
  Random random(3);
  float a[16][kDepth], b[8][kDepth], d[16][8], got[16][8];
  Element narrow_a[16][kDepth], narrow_b[8][kDepth];
  const auto number = [&] { return static_cast<float>(random.between(-8, 8)); };
  for (int k = 0; k < kDepth; ++k) {
    for (int m = 0; m < 16; ++m) narrow_a[m][k] = Product::narrow(a[m][k] = number());
    for (int n = 0; n < 8; ++n) narrow_b[n][k] = Product::narrow(b[n][k] = number());
  }
  for (auto& row : d) {
    for (float& x : row) x = number();
  }
  run_threads<32, sizeof(narrow_a) + sizeof(narrow_b)>([&](int lane) {
    char* a_tile = shared_memory();
    char* b_tile = a_tile + sizeof(narrow_a);
    if (lane == 0) {
      std::memcpy(a_tile, narrow_a, sizeof(narrow_a));
      std::memcpy(b_tile, narrow_b, sizeof(narrow_b));
    }
    sync_threads();
    std::uint32_t of_a[4], of_b[4];
    ldmatrix_x4(of_a, a_tile + lane % 16 * 32 + lane / 16 * 16);
    ldmatrix_x4(of_b, b_tile + lane % 8 * 32 + lane / 8 % 2 * 16);
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    Product::kMultiply(sums, of_a, of_b[0], of_b[1]);
    for (int i = 0; i < 4; ++i) got[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = sums[i];
  });
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      float expected = d[m][n];
      for (int k = 0; k < kDepth; ++k) expected += a[m][k] * b[n][k];
      CHECK_EQUAL(got[m][n], expected);
    }
  }
}

// ---- planted mistakes ---------------------------------------------------------------------------

template <Bug kBug>
bool is_right(std::uint64_t seed) {
  using Kernel = PlantedKernel<kBug>;
  Random random(4);
  const auto numbers = [&](int count) {
    std::vector<std::uint16_t> values(at(count));
    for (std::uint16_t& value : values)
      value = double_to_half(static_cast<double>(random.between(-8, 8)), kBFloat16Format);
    return values;
  };
  // cp.async wants them aligned, as operator new gives them.
  const std::vector<std::uint16_t> a = numbers(Kernel::kRows * Kernel::kDepth);
  const std::vector<std::uint16_t> b = numbers(Kernel::kColumns * Kernel::kDepth);
  std::vector<float> c(at(Kernel::kRows * Kernel::kColumns), -1.0f);
  emulator::set_seed(seed);
  emulator::run<Kernel>(1, Matrices{a.data(), b.data(), c.data()});
  for (int m = 0; m < Kernel::kRows; ++m) {
    for (int n = 0; n < Kernel::kColumns; ++n) {
      double expected = 0.0;
      for (int k = 0; k < Kernel::kDepth; ++k) {
        expected += half_to_double(a[at(m * Kernel::kDepth + k)], kBFloat16Format) *
                    half_to_double(b[at(n * Kernel::kDepth + k)], kBFloat16Format);
      }
      if (!(static_cast<double>(c[at(m * Kernel::kColumns + n)]) == expected)) return false;
    }
  }
  return true;
}

template <Bug kBug>
int wrong_seeds() {
  int wrong = 0;
  for (int seed = 0; seed < kSeeds; ++seed) wrong += !is_right<kBug>(static_cast<unsigned>(seed));
  return wrong;
}

template <Bug kBug>
void check_race() {
  if (kSeesRaces) {
    const Outcome outcome = in_child([] { return is_right<kBug>(1); });
    CHECK_EQUAL(outcome.exit_code, 66);
    CHECK(contains(outcome.errors, "WARNING: ThreadSanitizer: data race"));
  } else if (kFibers) {
    CHECK(wrong_seeds<kBug>() > 0);
  }
}

void test_planted_bugs() {
  CHECK_EQUAL(wrong_seeds<Bug::kNone>(), 0);
  CHECK_EQUAL(wrong_seeds<Bug::kWrongFragment>(), kSeeds);
  CHECK_EQUAL(wrong_seeds<Bug::kNoWait>(), kSeeds);
  check_race<Bug::kNoBarrierBefore>();
  check_race<Bug::kNoBarrierAfter>();
#ifdef SPARSE_ATTN_EMULATOR_ASAN
  const char* out_of_bounds = "AddressSanitizer: use-after-poison";
#else
  const char* out_of_bounds = "a store outside of the block's 2304 bytes of shared memory";
#endif
  check_dies(out_of_bounds, [] { is_right<Bug::kOutOfBounds>(1); });
}

/// Two accesses of threads that start and leave far from each other: no lock may seem to order
/// them.
void test_lone_race() {
  if (!kSeesRaces) return;
  const Outcome outcome = in_child([] {
    run_threads<128, sizeof(int)>([](int thread) {
      sync_threads();
      if (thread == 0) *shared<int>() = 1;
      if (thread == 127 && *shared<int>() == 2) sync_threads();
      sync_threads();
    });
    return true;
  });
  CHECK_EQUAL(outcome.exit_code, 66);
}

void test_broken_rules() {
  static const Bytes16 global[2] = {};
  check_dies("cp_async_16 at byte 48 of shared memory, which has 63 bytes", [] {
    run_threads<32, 63>([](int) { cp_async_16(shared_memory() + 48, global, true); });
  });
  check_dies("cp_async_16 at byte -16 of shared memory", [] {
    run_threads<32, 64>([](int) { cp_async_16(shared_memory() - 16, global, true); });
  });
  check_dies("ldmatrix_x4_trans at byte 8 of shared memory, which is not aligned", [] {
    run_threads<32, 64>([](int) {
      std::uint32_t d[4];
      ldmatrix_x4_trans(d, shared_memory() + 8);
    });
  });
  check_dies("global address that is not aligned", [] {
    run_threads<32, 64>(
        [](int) { cp_async_16(shared_memory(), reinterpret_cast<const char*>(global) + 4, true); });
  });
  check_dies("the kernel ends with 1 cp_async_16 that nobody waited for", [] {
    run_threads<32, 1024>([](int thread) {
      cp_async_16(shared_memory() + 16 * thread, global, true);
      cp_async_commit();
    });
  });
  check_dies("no thread can go on: 33 at sync_threads; 31 at the end;", [] {
    run_threads<64>([](int thread) {
      if (thread < 33) sync_threads();
    });
  });
  check_dies("divergent barrier: sync_threads", [] {
    run_threads<64>([](int thread) { thread < 5 ? sync_threads() : (void)sync_threads_or(true); });
  });
  check_dies("divergent warp: shuffle_xor(",
             [] { run_threads<32>([](int thread) { shuffle_xor(thread, thread < 5 ? 1 : 2); }); });
  check_dies("no thread can go on: 1 at shuffle_xor; 31 at the end;", [] {
    run_threads<32>([](int thread) {
      if (thread == 3) shuffle_xor(thread, 1);
    });
  });
  check_dies("shuffle_xor with mask 32",
             [] { run_threads<32>([](int thread) { shuffle_xor(thread, 32); }); });
}

}  // namespace

int main() {
  test_conversions();
  test_exp2();
  test_indices();
  test_shared_memory();
  test_barriers();
  test_shuffle<float>();
  test_shuffle<double>();
  test_shuffle<std::uint64_t>();
  test_cp_async();
  test_ldmatrix();
  test_product<BFloat16Product>();
  test_product<Float16Product>();
  test_product<TF32Product>();
  test_planted_bugs();
  test_lone_race();
  test_broken_rules();
  return check::report();
}
