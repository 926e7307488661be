#include "ops/modifiers.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "ops/checks.h"
#include "patterns/part.h"

namespace sparse_attn {
namespace {

void find_windows(const Expression& expression, std::vector<const Expression*>& found) {
  constexpr auto kInfinite = std::numeric_limits<std::int64_t>::max();
  if (expression.word == Word::kWindow) {
    const auto& sides = expression.values;
    const bool known = std::any_of(found.begin(), found.end(), [&](const Expression* other) {
      return other->values == expression.values;
    });
    if (!known && sides[0] != kInfinite && sides[1] != kInfinite) found.push_back(&expression);
  }
  for (const Expression& part : expression.parts) find_windows(part, found);
}

/// The window of each of the patterns listed, for tables of `columns` slots.
std::vector<SlotWindow> slot_windows(const char* name, const Expression& pattern,
                                     const c10::SymInt& columns) {
  std::vector<SlotWindow> windows;
  for (const Expression& one : head_patterns(pattern)) {
    std::vector<const Expression*> found;
    find_windows(one, found);
    TORCH_CHECK_VALUE(found.size() == 1,
                      "sparse_attn: expected a pattern with exactly one finite window for the "
                      "slots of ",
                      name, ", got one with ", found.size());
    const auto& sides = found[0]->values;
    const std::int64_t slots = sides[0] + 1 + sides[1];
    TORCH_CHECK_VALUE(columns == slots, "sparse_attn: expected ", name, " with ", slots,
                      " slots, left + 1 + right of the window, got ", columns);
    windows.push_back({sides[0], sides[2]});
  }
  const bool alike = std::all_of(windows.begin(), windows.end(), [&](const SlotWindow& w) {
    return w.left == windows[0].left && w.dilation == windows[0].dilation;
  });
  if (alike) windows.resize(1);
  TORCH_CHECK_NOT_IMPLEMENTED(
      windows.size() <= kMostSlotWindows, "sparse_attn: expected at most ", kMostSlotWindows,
      " patterns with windows of their own for the slots of ", name, ", got ", windows.size());
  return windows;
}

struct TableArgument {
  const char* name;
  const OptionalTensor& tensor;
  std::int64_t kind;
};

std::array<TableArgument, 2> tables_of(const CallOptions& a) {
  return {{{"bias", a.bias, a.bias_kind}, {"gate", a.gate, a.gate_kind}}};
}

/// What the dimensions of a table may be: its last two, and one in place of each of the others.
/// With a part of a sequence, tables with a row for each query hold the part's rows, and go by the
/// keys of the whole; tables of blocks are those of the whole.
void check_table_shape(const TableArgument& table, const AttentionArguments& a,
                       const Expression& pattern) {
  const SymSizesOf whole = whole_sizes_of(pattern, a);
  const c10::SymInt batch = a.query.sym_size(0), heads = a.query.sym_size(1),
                    n_q = table.kind > kDenseKind ? whole.n_q : a.query.sym_size(2),
                    n_k = whole.n_k;
  const auto given = table.tensor->sym_sizes();
  const auto fail = [&](const char* shape) {
    TORCH_CHECK_VALUE(false, "sparse_attn: expected ", table.name, " of shape ", shape, " with ",
                      batch, " examples, ", heads, " heads, ", n_q, " queries and ", n_k,
                      " keys, got ", given);
  };
  const bool rank = given.size() == 4;
  const auto one_or = [&](std::size_t dim, const c10::SymInt& size) {
    return rank && (given[dim] == 1 || given[dim] == size);
  };
  if (table.kind == kSlopesKind) {
    if (!one_or(0, batch) || given[1] != heads || given[2] != 1 || given[3] != 1)
      fail("(heads,), or (batch or 1, heads, 1, 1)");
  } else if (table.kind == kSlotsKind) {
    if (!one_or(0, batch) || given[1] != heads || !one_or(2, n_q))
      fail("(heads, slots), (heads, queries, slots) or (batch or 1, heads, queries or 1, slots)");
  } else {
    const c10::SymInt block = table.kind, rows = (n_q + block - 1) / block,
                      columns = (n_k + block - 1) / block;
    if (!one_or(0, batch) || !one_or(1, heads) || given[2] != rows || given[3] != columns) {
      fail(table.kind == kDenseKind
               ? "(batch or 1, heads or 1, queries, keys)"
               : "(batch or 1, heads or 1, blocks of queries, blocks of keys)");
    }
  }
}

void check_table(const TableArgument& table, const AttentionArguments& a,
                 const Expression& pattern) {
  if (!table.tensor) return;
  const at::Tensor& tensor = *table.tensor;
  TORCH_CHECK_VALUE(table.kind >= kSlopesKind && table.kind <= (std::int64_t{1} << 31),
                    "sparse_attn: expected ", table.name,
                    "_kind to be -1 (slopes), 0 (slots) or the side of blocks, got ", table.kind);
  TORCH_CHECK_VALUE(table.kind != kSlopesKind || table.name[0] == 'b',
                    "sparse_attn: expected gate_kind of at least 0, got ", table.kind,
                    ": a gate has no slopes");
  check_dense_like(table.name, tensor, a.query);
  check_table_shape(table, a, pattern);
  if (table.kind == kSlotsKind) slot_windows(table.name, pattern, tensor.sym_size(3));
}

void check_dropout(const AttentionArguments& a) {
  TORCH_CHECK_VALUE(a.dropout_p >= 0.0 && a.dropout_p <= 1.0,
                    "sparse_attn: expected dropout_p in [0, 1], got ", a.dropout_p);
  TORCH_CHECK_VALUE(a.dropout_p == 0.0 || a.dropout_seed,
                    "sparse_attn: expected dropout_seed with dropout_p=", a.dropout_p,
                    ", got none");
  if (!a.dropout_seed) return;
  TORCH_CHECK_TYPE(a.dropout_seed->scalar_type() == at::kLong,
                   "sparse_attn: expected dropout_seed of dtype int64, got ",
                   a.dropout_seed->scalar_type());
  TORCH_CHECK_VALUE(a.dropout_seed->dim() == 0,
                    "sparse_attn: expected dropout_seed of shape [], got ",
                    a.dropout_seed->sym_sizes());
  TORCH_CHECK_VALUE(a.dropout_seed->device() == a.query.device(),
                    "sparse_attn: expected dropout_seed on device ", a.query.device(),
                    ", as query, got ", a.dropout_seed->device());
}

}  // namespace

void check_modifiers(const AttentionArguments& a, const Expression& pattern) {
  for (const TableArgument& table : tables_of(a)) check_table(table, a, pattern);
  check_dropout(a);
  TORCH_CHECK_VALUE(!a.softcap || (std::isfinite(*a.softcap) && *a.softcap > 0.0),
                    "sparse_attn: expected softcap to be finite and above 0, got ", *a.softcap);
  if (!a.sink) return;
  check_dense_like("sink", *a.sink, a.query);
  TORCH_CHECK_VALUE(a.sink->dim() == 1 && a.sink->sym_size(0) == a.query.sym_size(1),
                    "sparse_attn: expected sink of shape [", a.query.sym_size(1), "] (heads), got ",
                    a.sink->sym_sizes());
}

void check_like_table(const char* name, const OptionalTensor& tensor, const char* table_name,
                      const OptionalTensor& table) {
  if (!tensor) return;
  TORCH_CHECK_VALUE(table, "sparse_attn: expected no ", name, " without ", table_name, ", got one");
  TORCH_CHECK_VALUE(tensor->sym_sizes() == table->sym_sizes(), "sparse_attn: expected ", name,
                    " of shape ", table->sym_sizes(), ", as ", table_name, ", got ",
                    tensor->sym_sizes());
}

LogitTable table_view(const at::Tensor& tensor, std::int64_t kind, std::int64_t first_query) {
  const auto stride = [&](int dim) { return tensor.size(dim) == 1 ? 0 : tensor.stride(dim); };
  LogitTable table;
  table.kind = kind == kSlopesKind  ? TableKind::kSlopes
               : kind == kSlotsKind ? TableKind::kSlots
                                    : TableKind::kBlocks;
  table.data = const_cast<void*>(tensor.const_data_ptr());
  table.batch_stride = stride(0);
  table.head_stride = stride(1);
  table.row_stride = stride(2);
  table.column_stride = stride(3);
  table.columns = tensor.size(3);
  table.size = tensor.numel();
  table.block = std::max<std::int64_t>(kind, 1);
  table.first_query = kind == kSlotsKind || kind == kDenseKind ? first_query : 0;
  return table;
}

std::int64_t first_query(const CallOptions& a, const Expression& pattern) {
  const Expression& one = head_patterns(pattern)[0];
  if (one.word != Word::kPart) return 0;
  const TokenRuns queries = with_value_errors([&] { return Part(one).queries; });
  const auto has_rows = [](const TableArgument& table) {
    return table.tensor &&
           (table.kind == kDenseKind || (table.kind == kSlotsKind && table.tensor->size(2) > 1));
  };
  const auto tables = tables_of(a);
  const bool by_rows = std::any_of(tables.begin(), tables.end(), has_rows);
  TORCH_CHECK_NOT_IMPLEMENTED(!by_rows || queries.size() <= 1,
                              "sparse_attn: expected tables without a row for each query with "
                              "queries that are not consecutive, got one");
  return queries.empty() ? 0 : queries[0].token;
}

CallModifiers::CallModifiers(const AttentionArguments& a, const Expression& pattern)
    : real_(lse_type(a.query)), first_query_(first_query(a, pattern)) {
  modifiers_.bias = table(a.bias, a.bias_kind);
  modifiers_.gate = table(a.gate, a.gate_kind);
  modifiers_.softcap = a.softcap.value_or(0.0);
  modifiers_.windows[0] = {0, 1};
  for (const TableArgument& of : tables_of(a)) {
    if (!of.tensor || of.kind != kSlotsKind) continue;
    const auto windows = slot_windows(of.name, pattern, of.tensor->size(3));
    std::copy(windows.begin(), windows.end(), modifiers_.windows);
    modifiers_.window_count = static_cast<std::int32_t>(windows.size());
  }
  if (a.dropout_p == 0.0) return;
  modifiers_.dropout_p = a.dropout_p;
  kept_.push_back(*a.dropout_seed);
  modifiers_.dropout_seed = kept_.back().const_data_ptr<std::int64_t>();
}

LogitTable CallModifiers::table(const OptionalTensor& tensor, std::int64_t kind) {
  if (!tensor) return {};
  kept_.push_back(tensor->to(real_));
  return table_view(kept_.back(), kind, first_query_);
}

}  // namespace sparse_attn
