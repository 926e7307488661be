#include "ops/pattern_tensors.h"

#include <algorithm>

namespace sparse_attn {
namespace {

/// Adds the leading dimensions that were left out, up to `rank`; those that only repeat become 1.
at::Tensor with_rank(at::Tensor tensor, std::int64_t rank) {
  while (tensor.dim() < rank) tensor = tensor.unsqueeze(0);
  for (const int dim : {0, 1}) {
    if (tensor.stride(dim) == 0 && tensor.size(dim) > 1) tensor = tensor.narrow(dim, 0, 1);
  }
  return tensor.contiguous();
}

}  // namespace

PatternTensors::PatternTensors(const Expression& pattern, const OptionalTensors& given) {
  for (const Expression* user : tensor_users(pattern)) {
    const auto first = static_cast<std::size_t>(user->tensor);
    const at::Tensor& tensor = (*given)[first];
    tensors_.push_back({with_rank(tensor, 4), tensor.size(-1)});
    if (own_tensors(*user) > 1)
      tensors_.push_back({with_rank((*given)[first + 1].to(at::kLong), 3), 1});
  }
}

std::vector<at::Tensor> PatternTensors::tensors() const {
  std::vector<at::Tensor> all;
  for (const OneTensor& tensor : tensors_) all.push_back(tensor.data);
  return all;
}

std::vector<PatternTensor> PatternTensors::slices(std::int64_t example, std::int64_t head) const {
  std::vector<PatternTensor> slices;
  for (const auto& [data, columns] : tensors_) {
    const std::int64_t b = data.size(0) == 1 ? 0 : example, h = data.size(1) == 1 ? 0 : head;
    const auto offset = static_cast<std::size_t>(b * data.stride(0) + h * data.stride(1));
    slices.push_back(
        {static_cast<const char*>(data.const_data_ptr()) + offset * data.element_size(), columns,
         data.scalar_type() == at::kInt});
  }
  return slices;
}

std::int64_t PatternTensors::largest(const Expression& part, int dim) const {
  std::int64_t most = 1;
  for (const Expression* user : tensor_users(part)) {
    const auto first = static_cast<std::size_t>(user->tensor);
    const std::size_t end = first + static_cast<std::size_t>(own_tensors(*user));
    for (std::size_t i = first; i < end; ++i) most = std::max(most, tensors_[i].data.size(dim));
  }
  return most;
}

}  // namespace sparse_attn
