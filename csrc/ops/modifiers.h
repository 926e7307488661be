// Bias, gate, soft cap and dropout of a call: checked, and as the kernels read them.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "ops/tensors.h"
#include "params.h"
#include "patterns/expression.h"

namespace sparse_attn {

/// Works on symbolic sizes.
void check_modifiers(const AttentionArguments& arguments, const Expression& pattern);

/// That `tensor`, if given, has the dtype and shape of the table, which must be given then.
void check_like_table(const char* name, const OptionalTensor& tensor, const char* table_name,
                      const OptionalTensor& table);

/// A table as the kernels read it; `tensor` has the type of the log-sum-exp and is the caller's to
/// keep.
LogitTable table_view(const at::Tensor& tensor, std::int64_t kind, std::int64_t first_query);

/// Whose row tables with a row for each query begin with: 0, or a part's first query.
std::int64_t first_query(const CallOptions& options, const Expression& pattern);

class CallModifiers {
 public:
  CallModifiers(const AttentionArguments& arguments, const Expression& pattern);
  const Modifiers& get() const { return modifiers_; }

  /// A table in the type of the log-sum-exp, kept as long as this; none if there is none.
  LogitTable table(const OptionalTensor& tensor, std::int64_t kind);

 private:
  at::ScalarType real_;
  std::int64_t first_query_;
  std::vector<at::Tensor> kept_;  // what the pointers look into
  Modifiers modifiers_;
};

/// The sums of one table's gradient on their way.
class GradientOfTable {
 public:
  GradientOfTable(const OptionalTensor& table, std::int64_t kind, const at::Tensor& query,
                  std::int64_t first_query)
      : result_(empty_like_table(table, query)) {
    if (!table) return;
    sums_ = at::zeros(table->sizes(), query.options().dtype(lse_type(query)));
    view_ = table_view(sums_, kind, first_query);
  }
  const LogitTable& sums() const { return view_; }
  at::Tensor finish() const { return sums_.defined() ? result_.copy_(sums_) : result_; }

 private:
  at::Tensor result_, sums_;
  LogitTable view_;
};

}  // namespace sparse_attn
