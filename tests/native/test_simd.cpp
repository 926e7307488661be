// The vector code itself, for the instruction set that this file is compiled for: exp, the half
// types, transposition, products, and the part of a tile that is computed.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/fetch_ahead.h"
#include "cpu/gemm.h"
#include "cpu/softmax.h"
#include "cpu/tile.h"
#include "cpu/visible_blocks.h"
#include "random_patterns.h"
#include "scalar_types.h"

namespace {

template <class T>
T exp_of(T x) {
  T lanes[kLanes<T>];
  store(lanes, exp<T>(broadcast(x)));
  for (const T lane : lanes) CHECK(std::memcmp(&lane, lanes, sizeof(T)) == 0);
  return lanes[0];
}

/// Distance from e^x in units of the last place.
template <class T>
double exp_error(T x) {
  const double exact = std::exp(static_cast<double>(x));
  const double unit = std::ldexp(1.0, std::ilogb(exact) - ExpConstants<T>::kMantissa);
  return std::fabs(static_cast<double>(exp_of(x)) - exact) / unit;
}

template <class T>
void test_exp(const T (&nans)[4], double most_units) {
  Random random(1);
  const double least = ExpConstants<T>::kLeast;
  double worst = 0.0;
  for (int i = 0; i < 60000; ++i) {
    const double range = i % 3 == 0 ? 1.0 : i % 3 == 1 ? 20.0 : -0.999 * least;
    worst = std::max(worst, exp_error(static_cast<T>(random.real() * range)));
  }
  if (worst > most_units) std::cerr << "exp is wrong by " << worst << " units\n";
  CHECK(worst <= most_units);
  CHECK_EQUAL(exp_of(T(0)), T(1));
  CHECK_EQUAL(exp_of(T(-0.0)), T(1));
  CHECK(exp_of(static_cast<T>(least)) > T(0));
  for (const double small :
       {least - 1e-3, least - 1.0, 2 * least, -1e30, -static_cast<double>(INFINITY)}) {
    CHECK_EQUAL(exp_of(static_cast<T>(small)), T(0));  // below the normal numbers
  }
  CHECK_EQUAL(exp_of(-std::numeric_limits<T>::max()), T(0));
  for (const T nan : nans) CHECK(std::isnan(exp_of(nan)));
}

template <class S>
void test_load_half(const HalfFormat& format) {
  constexpr int kStep = kLanes<float>;
  for (std::uint32_t first = 0; first < 0x10000; first += kStep) {
    S from[kStep + 1];  // at an address that is no multiple of a vector
    for (int i = 0; i < kStep; ++i) from[i + 1].bits = static_cast<uint16_t>(first + i);
    float got[kStep];
    store(got, load_real(from + 1));
    for (int i = 0; i < kStep; ++i) {
      const double expected = half_to_double(from[i + 1].bits, format);
      check::context = "half " + std::to_string(from[i + 1].bits);
      CHECK(std::isnan(expected) ? std::isnan(got[i]) : got[i] == expected);
      CHECK_EQUAL(std::signbit(got[i]), (from[i + 1].bits & 0x8000) != 0);
    }
  }
  check::context.clear();
}

template <class S>
void check_store_half(const std::vector<float>& values, const HalfFormat& format) {
  constexpr int kStep = kLanes<float>;
  for (std::size_t first = 0; first + kStep <= values.size(); first += kStep) {
    S to[kStep + 1];
    store_real(to + 1, load(values.data() + first));
    for (int i = 0; i < kStep; ++i) {
      const float value = values[first + static_cast<std::size_t>(i)];
      const uint16_t expected = double_to_half(static_cast<double>(value), format);
      const uint16_t got = to[i + 1].bits;
      if (std::isnan(value)) {
        CHECK((got & 0x7fff) > format.infinity());
        CHECK((got & 1 << (format.mantissa_bits - 1)) != 0);  // quiet
        CHECK_EQUAL(got & 0x8000, expected & 0x8000);
      } else {
        if (got != expected) check::context = "float " + std::to_string(value);
        CHECK_EQUAL(got, expected);
      }
    }
  }
  check::context.clear();
}

template <class S>
void test_store_half(const HalfFormat& format) {
  std::vector<float> values;
  // Every half, the middle to the next one, and the floats beside both.
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const double x = half_to_double(half, format);
    const double next = half_to_double(static_cast<uint16_t>(half + 1), format);
    const double above = (half & 0x7fff) + 1 == format.infinity()  // beyond the largest half
                             ? x + std::copysign(format.unit(x), x)
                             : next;
    for (const double at : {x, (x + above) / 2}) {
      const auto value = static_cast<float>(at);
      values.insert(values.end(),
                    {value, std::nextafter(value, -INFINITY), std::nextafter(value, INFINITY)});
    }
  }
  Random random(2);
  for (int i = 0; i < 100000; ++i) {
    values.push_back(float_from_bits(static_cast<std::uint32_t>(random.word())));
  }
  for (const std::uint32_t nan : {0x7f800001u, 0x7fffffffu, 0xff800001u, 0xffffffffu, 0x7fc00000u,
                                  0x7f801000u, 0xffbfffffu, 0x7f80ffffu}) {
    values.push_back(float_from_bits(nan));
  }
  values.resize((values.size() + 63) / 64 * 64);
  check_store_half<S>(values, format);
}

/// The last few elements of a row: nothing beyond them is read or written.
template <class S>
void test_row_parts() {
  using T = Real<S>;
  for (int size = 1; size <= 3 * kLanes<T>; ++size) {
    const int padded = round_up(size, kLanes<T>);
    std::vector<S> from(static_cast<std::size_t>(size)), back(static_cast<std::size_t>(size));
    std::vector<T> wide(static_cast<std::size_t>(2 * padded), T(-1));
    const std::vector<T> one(static_cast<std::size_t>(padded), T(1));
    unpack_row<S>(from.data(), one.data(), size);  // exactly as long: sanitizers see more
    pack_row<S>(wide.data(), from.data(), size, padded);
    for (int i = 0; i < 2 * padded; ++i) {
      const T expected = i < size ? T(1) : i < padded ? T(0) : T(-1);
      CHECK_EQUAL(wide[static_cast<std::size_t>(i)], expected);
    }
    unpack_row<S>(back.data(), wide.data(), size);
    CHECK(std::memcmp(back.data(), from.data(), from.size() * sizeof(S)) == 0);
  }
}

template <class T>
void test_transpose_rows() {
  const int columns = 3 * kLanes<T>;
  for (int count = 1; count <= kMaxTile; ++count) {
    const int stride = columns + 1;
    std::vector<T> from(static_cast<std::size_t>(kMaxTile * stride));
    for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<T>(i + 1);
    std::vector<T> to(static_cast<std::size_t>(columns * kMaxTile), T(-1));
    const int written = columns - count % 5;  // not always whole vectors
    transpose_rows<T>(to.data(), kMaxTile, {from.data(), stride}, count, written, T(2));
    for (int c = 0; c < columns; ++c) {
      for (int r = 0; r < kMaxTile; ++r) {
        const T expected = c >= written || r >= round_up(count, kLanes<T>) ? T(-1)
                           : r < count ? static_cast<T>(2 * (r * stride + c + 1))
                                       : T(0);
        CHECK_EQUAL(to[static_cast<std::size_t>(c * kMaxTile + r)], expected);
      }
    }
  }
}

/// Every lane of every word is kept or replaced as its bit says.
template <class T>
void test_keep_lanes() {
  Random random(3);
  for (int i = 0; i < 2000; ++i) {
    const uint64_t word = i == 0 ? 0 : i == 1 ? ~uint64_t{0} : random.word();
    for (int v = 0; v < kMaxTile / kLanes<T>; ++v) {
      T lanes[kLanes<T>];
      store(lanes, keep_lanes<T>(broadcast(T(1)), word, v, T(-2)));
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        CHECK_EQUAL(lanes[lane], (word >> (v * kLanes<T> + lane) & 1) ? T(1) : T(-2));
      }
    }
  }
}

/// Small whole numbers, so that the products are exact whatever the order of the sums.
template <class T, bool kRowMajor>
void check_gemm(Random& random, int m_size, int vectors, int k_size) {
  const int n_size = vectors * kLanes<T>;
  const int stride = (kRowMajor ? k_size : m_size) + 2;
  const auto numbers = [&](int count) {
    std::vector<T> values(static_cast<std::size_t>(count));
    for (T& value : values) value = static_cast<T>(random.between(-4, 4));
    return values;
  };
  const std::vector<T> a = numbers((kRowMajor ? m_size : k_size) * stride - 2);
  const std::vector<T> b = numbers(k_size * n_size);
  std::vector<T> set(static_cast<std::size_t>(m_size * n_size), T(99)), added(set.size(), T(5));
  const Operand<T, kRowMajor> operand{a.data(), stride};
  gemm(m_size, vectors, k_size, operand, b.data(), n_size, SetTo<T>{set.data(), n_size});
  gemm(m_size, vectors, k_size, operand, b.data(), n_size, AddTo<T>{added.data(), n_size});
  for (int m = 0; m < m_size; ++m) {
    for (int n = 0; n < n_size; ++n) {
      T expected{0};
      for (int k = 0; k < k_size; ++k) {
        expected += a[static_cast<std::size_t>(kRowMajor ? m * stride + k : k * stride + m)] *
                    b[static_cast<std::size_t>(k * n_size + n)];
      }
      const auto at = static_cast<std::size_t>(m * n_size + n);
      CHECK_EQUAL(set[at], expected);
      CHECK_EQUAL(added[at], expected + T(5));
    }
  }
}

template <class T>
void test_gemm() {
  Random random(4);
  for (int m_size = 1; m_size <= 27; ++m_size) {
    for (int vectors = 1; vectors <= 9; ++vectors) {
      const int k_size = static_cast<int>(random.between(1, 9));
      check_gemm<T, true>(random, m_size, vectors, k_size);
      check_gemm<T, false>(random, m_size, vectors, k_size);
    }
  }
}

/// How often the blocks compute each pair of a key and a vector of queries.
template <class T>
using Coverage = std::vector<std::vector<int>>;

template <class T, class Part>
Coverage<T> coverage(const sparse_attn::Array<Part>& parts, int keys, int vectors) {
  Coverage<T> times(static_cast<std::size_t>(keys),
                    std::vector<int>(static_cast<std::size_t>(vectors)));
  for (const Part& part : parts) {
    CHECK(0 <= part.keys.begin && part.keys.end <= keys && !part.keys.empty());
    CHECK(0 <= part.vectors.begin && part.vectors.end <= vectors && !part.vectors.empty());
    for (int k = part.keys.begin; k < part.keys.end; ++k) {
      for (int v = part.vectors.begin; v < part.vectors.end; ++v)
        ++times[static_cast<std::size_t>(k)][static_cast<std::size_t>(v)];
    }
  }
  return times;
}

/// Both ways compute the same pairs once, all that are seen among them. Returns how many.
template <class T>
int check_visible(const std::vector<uint64_t>& words, int queries) {
  const int keys = static_cast<int>(words.size());
  const int vectors = round_up(queries, kLanes<T>) / kLanes<T>;
  VisibleBlocks<T> blocks;
  blocks.set(words.data(), keys, vectors);
  const Coverage<T> columns = coverage<T>(blocks.columns(), keys, vectors);
  CHECK(columns == coverage<T>(blocks.rows(), keys, vectors));
  int computed = 0;
  for (int k = 0; k < keys; ++k) {
    for (int v = 0; v < vectors; ++v) {
      const int times = columns[static_cast<std::size_t>(k)][static_cast<std::size_t>(v)];
      const uint64_t lanes = ~uint64_t{0} >> (64 - kLanes<T>) << (v * kLanes<T>);
      CHECK(times <= 1);
      CHECK(times == 1 || (words[static_cast<std::size_t>(k)] & lanes) == 0);
      computed += times * kLanes<T>;
    }
  }
  return computed;
}

/// The queries r of 64 that see key k when |r + shift - k| <= reach.
std::vector<uint64_t> band(int keys, int shift, int reach) {
  std::vector<uint64_t> words(static_cast<std::size_t>(keys));
  for (int k = 0; k < keys; ++k) {
    for (int r = 0; r < kMaxTile; ++r) {
      if (std::abs(r + shift - k) <= reach) words[static_cast<std::size_t>(k)] |= uint64_t{1} << r;
    }
  }
  return words;
}

template <class T>
void test_visible_blocks() {
  Random random(5);
  for (int i = 0; i < 2000; ++i) {
    const int keys = static_cast<int>(random.between(1, kMaxTile));
    const int queries = static_cast<int>(random.between(1, kMaxTile));
    check_visible<T>(band(keys, static_cast<int>(random.between(-70, 70)),
                          static_cast<int>(random.between(0, 70))),
                     queries);
    std::vector<uint64_t> sparse(static_cast<std::size_t>(keys));
    for (uint64_t& word : sparse) {
      if (random.between(0, 3) == 0) word = uint64_t{1} << random.between(0, 63);
    }
    check_visible<T>(sparse, queries);
  }
  CHECK_EQUAL(check_visible<T>(std::vector<uint64_t>(64, ~uint64_t{0}), 64), 64 * 64);
  CHECK_EQUAL(check_visible<T>(std::vector<uint64_t>(64, 0), 64), 0);
  CHECK_EQUAL(check_visible<T>(std::vector<uint64_t>(64, 1), 64), 64 * kLanes<T>);
  // Edges of a window: triangles, of which little more than a half is computed.
  CHECK(check_visible<T>(band(64, 64, 64), 64) < 64 * 64 * 7 / 10);
  CHECK(check_visible<T>(band(64, -64, 64), 64) < 64 * 64 * 7 / 10);
}

#if defined(__x86_64__)
bool runs_here() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}
#else
bool runs_here() { return true; }
#endif

/// The last rows that came are fetched first, a block of 256 bytes at a time; without any, what is
/// fetched is in the stack itself.
void test_fetch_stack() {
  float rows[100 * 128];
  const Head<const float> head{rows, 128};
  FetchStack stack;
  const auto at = [&](const FetchBlock& block) { return block.data; };
  const auto place = [&](int row, int column) {
    return reinterpret_cast<const char*>(rows + row * 128 + column);
  };
  stack.push(head, {3, 5, 10, -1}, 128);
  stack.push(head, {7, 1, 64, -1}, 64);
  stack.push(head, {0, 1, 64, 0}, 64);  // of a list: cannot be
  CHECK(at(stack.take(false)) == reinterpret_cast<const char*>(&stack));
  const FetchBlock last = stack.take();
  CHECK(at(last) == place(7, 0));
  CHECK_EQUAL(last.stride, 512);
  const FetchBlock second_half = stack.take();
  CHECK(at(second_half) == place(3, 64));
  CHECK_EQUAL(second_half.stride, 5 * 512);
  CHECK(at(stack.take()) == place(3, 0));
  CHECK(at(stack.take()) == reinterpret_cast<const char*>(&stack));
  for (int i = 0; i < 100; ++i) stack.push(head, {i, 1, 1, -1}, 64);
  CHECK(at(stack.take()) != reinterpret_cast<const char*>(&stack));
  stack.clear();
  CHECK(at(stack.take()) == reinterpret_cast<const char*>(&stack));
}

/// Each key tile is told which comes after it.
void test_for_each_key_tile() {
  const Run runs[] = {{4, 2, -1}, {9, 1, 3}, {6, 3, -1}};
  Segment first{}, second{}, empty{};
  first.end_run = second.first_run = 2;
  second.end_run = 3;
  PassView pass{};
  pass.runs = {runs, 3};
  const auto visited = [&](const Segment& segment, const Segment* after) {
    std::vector<std::vector<int>> all;
    for_each_key_tile(pass, segment, after, [&](int32_t tile, int32_t mask, int32_t next) {
      all.push_back({tile, mask, next});
    });
    return all;
  };
  using Visits = std::vector<std::vector<int>>;
  CHECK((visited(first, &second) == Visits{{4, -1, 5}, {5, -1, 9}, {9, 3, 6}}));
  CHECK((visited(first, &empty) == Visits{{4, -1, 5}, {5, -1, 9}, {9, 3, -1}}));
  CHECK((visited(second, nullptr) == Visits{{6, -1, 7}, {7, -1, 8}, {8, -1, -1}}));
  CHECK(visited(empty, &second).empty());
}

}  // namespace

int main() {
  if (!runs_here()) {
    std::cout << "this machine lacks the instruction set\n";
    return 0;
  }
  test_exp<float>({float_from_bits(0x7fc00000u), float_from_bits(0xffc00000u),
                   float_from_bits(0x7fffffffu), float_from_bits(0x7fc12345u)},
                  1.5);
  test_exp<double>({double_from_bits(0x7ff8000000000000u), double_from_bits(0xfff8000000000000u),
                    double_from_bits(0x7fffffffffffffffu), double_from_bits(0x7ff8000000012345u)},
                   2.0);
  test_load_half<BFloat16>(kBFloat16Format);
  test_load_half<Float16>(kFloat16Format);
  test_store_half<BFloat16>(kBFloat16Format);
  test_store_half<Float16>(kFloat16Format);
  test_row_parts<float>();
  test_row_parts<double>();
  test_row_parts<BFloat16>();
  test_row_parts<Float16>();
  test_transpose_rows<float>();
  test_transpose_rows<double>();
  test_keep_lanes<float>();
  test_keep_lanes<double>();
  test_gemm<float>();
  test_gemm<double>();
  test_visible_blocks<float>();
  test_visible_blocks<double>();
  test_fetch_stack();
  test_for_each_key_tile();
  return check::report();
}
