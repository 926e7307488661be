// Every kernel once, on problems as small as they can be: for the emulator's threads, with which
// ThreadSanitizer reports a missing barrier as the data race that it is. A wait takes a hundred
// times as long there.
#include <cstdlib>

#include "cuda_case.h"
#include "random_modifiers.h"

namespace {

using namespace attention;

void run_case(DataType type, const cuda::Device& device, const Expression& pattern, Sizes sizes,
              std::int64_t size, const ModifierKinds& kinds = {}) {
  Random random(1);
  Shape shape;
  shape.sizes = sizes;
  shape.head_dim = shape.value_dim = size;
  Case c(random, type, shape, {pattern});
  c.listing = Listing::kAll;
  modify(random, c, kinds);
  const bool modified = c.modifiers.view().any();
  const cuda::Kernels& kernels = cuda::kernels_for({c.type, size, true, modified, device});
  check::context = std::string(kernels.path) + ", " + c.to_string();
  c.precision = precision_of(kernels, type);
  const Results results = run(kernels, c);
  check_forward(c, results);
  check_backward(c, results);
  check::context.clear();
}

}  // namespace

int main() {
  setenv("SPARSE_ATTN_SM90", "1", 1);
  constexpr cuda::Device kTuring{75, 64 * 1024}, kAmpere{80, 163 * 1024}, kHopper{90, 227 * 1024};
  // Two tiles in pairs, a mask, a gathered key in a slot.
  const Expression pattern = any_of({window(30, 30), global_keys({0, 1})});
  run_case(DataType::kBFloat16, kAmpere, pattern, {90, 90}, 32);
  run_case(DataType::kBFloat16, kHopper, pattern, {90, 90}, 64);
  run_case(DataType::kFloat32, kTuring, pattern, {70, 70}, 8);
  // Two orders of the tokens, and lists.
  run_case(DataType::kFloat32, kTuring, any_of({window(1, 1), window(2, 2, 9)}), {40, 40}, 8);
  // The kernels for modifiers.
  const ModifierKinds kinds{TableKind::kSlots, TableKind::kBlocks, 16, true, 2.0, 0.5};
  run_case(DataType::kBFloat16, kAmpere, pattern, {90, 90}, 32, kinds);
  run_case(DataType::kFloat32, kTuring, any_of({window(30, 30), window(2, 2, 9)}), {70, 70}, 8,
           kinds);
  return check::report();
}
