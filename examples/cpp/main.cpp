// Sliding-window attention from C++, compared with the same attention written densely.
#include <ATen/ATen.h>
#include <sparse_attn/build_info.h>
#include <sparse_attn/sparse_attn.h>

#include <cstdio>

namespace {

constexpr std::int64_t kLength = 1000;
constexpr std::int64_t kLeft = 64;
constexpr std::int64_t kRight = 16;

at::Tensor dense(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  const at::Tensor position = at::arange(kLength);
  const at::Tensor distance = position.unsqueeze(0) - position.unsqueeze(1);
  const at::Tensor mask = distance.ge(-kLeft).logical_and(distance.le(kRight));
  return at::scaled_dot_product_attention(query, key, value, mask);
}

}  // namespace

int main() {
  const auto random = [] { return at::randn({2, 4, kLength, 64}).requires_grad_(); };
  const at::Tensor query = random(), key = random(), value = random();

  const auto [output, logsumexp] = sparse_attn::window_attention(query, key, value, kLeft, kRight);
  output.square().sum().backward();
  const at::Tensor gradient = query.grad().clone();

  query.mutable_grad().zero_();
  const at::Tensor expected = dense(query, key, value);
  expected.square().sum().backward();

  const auto error = [](const at::Tensor& a, const at::Tensor& b) {
    return (a - b).abs().max().item<double>();
  };
  const double output_error = error(output, expected),
               gradient_error = error(gradient, query.grad());
  std::printf("%s kernels, largest difference from dense attention: output %.1e, gradient %.1e\n",
              sparse_attn::build_info().isa.c_str(), output_error, gradient_error);
  return output_error < 1e-5 && gradient_error < 1e-4 ? 0 : 1;
}
