// What nodes of autograd keep of a call.
#pragma once

#include <torch/csrc/autograd/saved_variable.h>

#include <vector>

#include "ops/arguments.h"

namespace sparse_attn {

using torch::autograd::SavedVariable;

/// A tensor that may not be given.
class SavedOptional {
 public:
  void save(const OptionalTensor& tensor) {
    exists_ = tensor.has_value();
    if (exists_) saved_ = SavedVariable(*tensor, false);
  }
  OptionalTensor unpack() const { return exists_ ? OptionalTensor(saved_.unpack()) : std::nullopt; }
  void reset() { saved_.reset_data(); }

 private:
  bool exists_ = false;
  SavedVariable saved_;
};

/// The inputs of a call.
class SavedCall {
 public:
  void save(const AttentionArguments& a) {
    options_ = a;
    pattern_ = a.pattern.vec();
    query_ = SavedVariable(a.query, false);
    key_ = SavedVariable(a.key, false);
    value_ = SavedVariable(a.value, false);
    key_padding_mask_.save(a.key_padding_mask);
    global_mask_.save(a.global_mask);
    bias_.save(a.bias);
    gate_.save(a.gate);
    dropout_seed_.save(a.dropout_seed);
    for (const at::Tensor& tensor : a.pattern_tensors.value_or(at::ArrayRef<at::Tensor>()))
      pattern_tensors_.emplace_back(tensor, false);
    clear_tensors(options_);
  }

  /// The arguments, whose lists lie in `tensors` and here.
  AttentionArguments unpack(std::vector<at::Tensor>& tensors) const {
    for (const SavedVariable& saved : pattern_tensors_) tensors.push_back(saved.unpack());
    AttentionArguments a{options_, query_.unpack(), key_.unpack(), value_.unpack()};
    a.pattern = pattern_;
    a.pattern_tensors = at::ArrayRef<at::Tensor>(tensors);
    a.key_padding_mask = key_padding_mask_.unpack();
    a.global_mask = global_mask_.unpack();
    a.bias = bias_.unpack();
    a.gate = gate_.unpack();
    a.dropout_seed = dropout_seed_.unpack();
    return a;
  }

  void reset() {
    for (SavedVariable* saved : {&query_, &key_, &value_}) saved->reset_data();
    for (SavedOptional* saved : {&key_padding_mask_, &global_mask_, &bias_, &gate_, &dropout_seed_})
      saved->reset();
    for (SavedVariable& saved : pattern_tensors_) saved.reset_data();
  }

 private:
  static void clear_tensors(CallOptions& options) {
    options.pattern = {};
    for (OptionalTensor* tensor : {&options.key_padding_mask, &options.global_mask, &options.bias,
                                   &options.gate, &options.dropout_seed, &options.sink})
      tensor->reset();
    options.pattern_tensors.reset();
  }

  CallOptions options_;  // without tensors and lists
  std::vector<std::int64_t> pattern_;
  SavedVariable query_, key_, value_;
  SavedOptional key_padding_mask_, global_mask_, bias_, gate_, dropout_seed_;
  std::vector<SavedVariable> pattern_tensors_;
};

}  // namespace sparse_attn
