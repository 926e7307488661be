// A call of the CUDA kernels on the emulator: plans, image, workspaces, as the torch bridge does
// it.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "attention_case.h"
#include "cuda/run.h"
#include "patterns/split.h"

namespace attention {

/// That of the type; on tensor cores with the rounding of P and dS to it, and of all operands to
/// TF32.
inline Precision precision_of(const cuda::Kernels& kernels, DataType type) {
  if (std::string(kernels.path) == "simt") return {};
  if (type != DataType::kFloat32) return half_products(type);
  return {2 * 0x1p-11 / Precision::kUnit, 2 * 0x1p-11 / Precision::kUnit};
}

/// One plan for each of the case's patterns, laid out where the kernels read it.
class EmulatedPlans {
 public:
  EmulatedPlans(const Case& c, Grouping grouping, bool backward)
      : image_(plans_of(c), {grouping, c.shape.batch * c.shape.heads(), backward}),
        bytes_(index(image_.size()) + 16) {
    const std::vector<char> bytes = image_.at(base());
    std::copy(bytes.begin(), bytes.end(), base());
  }
  const GridImage& image() const { return image_; }
  char* base() { return bytes_.data(); }  // operator new aligns it to 16 bytes

 private:
  static std::vector<HeadPlan> plans_of(const Case& c) {
    std::vector<HeadPlan> plans;
    for (const Expression& pattern : c.patterns) {
      const Sizes sizes = c.shape.sizes;
      const Expression planned = c.left_to_programs ? no_pair() : pattern;
      plans.push_back(
          {std::make_shared<const Plan>(build_plan(expand(planned, sizes), sizes, {}, c.listing))});
      if (c.left_to_programs) plans.back().looked_up = compile(pattern, sizes);
    }
    return plans;
  }
  GridImage image_;
  std::vector<char> bytes_;
};

inline cuda::Call call_of(Case& c, EmulatedPlans& plans) {
  cuda::Call call;
  call.params = params_of(c);
  call.image = &plans.image();
  call.base = plans.base();
  call.plan_heads = static_cast<std::int32_t>(c.patterns.size());
  return call;
}

/// Gradients in the type that the kernels add up in, and their way to the tensor's own.
class WideGradient {
 public:
  WideGradient(const Case& c, Tensor& narrow, bool wide, std::int64_t heads, std::int64_t length,
               std::int64_t size)
      : narrow_(narrow),
        sums_(wide ? real_type(c.type) : c.type, c.shape.layout, c.shape.batch, heads, length,
              size) {
    sums_.fill([] { return 0.0; });
  }
  TensorView view() { return sums_.view(); }
  void finish() {
    narrow_.for_each(
        [&](auto b, auto h, auto i, auto d) { narrow_.set(b, h, i, d, sums_.get(b, h, i, d)); });
  }

 private:
  Tensor& narrow_;
  Tensor sums_;
};

/// Forward, then backward on what forward gave.
inline Results run(const cuda::Kernels& kernels, Case& c) {
  Results results(c);
  {
    EmulatedPlans plans(c, kernels.in_forward, false);
    cuda::Call call = call_of(c, plans);
    call.params.output = results.output.view();
    call.params.lse = results.lse.data();
    Workspace workspace(cuda::forward_workspace(kernels, call));
    call.params.workspace = workspace.data();
    cuda::forward(kernels, call);
  }
  EmulatedPlans plans(c, kernels.in_backward, true);
  cuda::Call call = call_of(c, plans);
  const bool wide = cuda::adds_to_gradients(kernels, call);
  const auto [n_q, n_k] = c.shape.sizes;
  WideGradient query(c, results.grad_query, wide, c.shape.heads(), n_q, c.shape.head_dim),
      key(c, results.grad_key, wide, c.shape.heads_kv, n_k, c.shape.head_dim),
      value(c, results.grad_value, wide, c.shape.heads_kv, n_k, c.shape.value_dim);
  call.params.output = results.output.view();
  call.params.lse = results.lse.data();
  call.params.grad_output = c.grad_output.view();
  call.params.grad_lse = c.grad_lse.bytes().empty() ? nullptr : c.grad_lse.data();
  call.params.grad_query = query.view();
  call.params.grad_key = key.view();
  call.params.grad_value = value.view();
  Workspace workspace(cuda::backward_workspace(kernels, call));
  call.params.workspace = workspace.data();
  cuda::backward(kernels, call, wide);
  for (WideGradient* gradient : {&query, &key, &value}) gradient->finish();
  return results;
}

/// Forward and backward of kernels that are to be those of that name, twice: the bits are the same
/// whatever the order of threads and blocks.
inline void check_case(const cuda::Kernels& kernels, const std::string& path, Case& c) {
  c.precision = precision_of(kernels, c.type);
  check::context = std::string(kernels.path) + ", " + c.to_string();
  CHECK_EQUAL(std::string(kernels.path), path);
  const Results results = run(kernels, c);
  CHECK(run(kernels, c) == results);
  check_forward(c, results);
  check_backward(c, results);
  check::context.clear();
}

}  // namespace attention
