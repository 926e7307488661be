#include "cuda/tables.h"

#include <algorithm>

namespace sparse_attn::cuda {
namespace {

/// Blocks to aim for, as the tasks of a sweep, as far as the partial tables leave memory.
constexpr std::int64_t kTargetBlocks = 1024;
constexpr std::int64_t kMostPartialBytes = std::int64_t{64} << 20;
constexpr std::int64_t kLeastRows = 8;  // of a strip

/// Larger tables of blocks have owners of their rows in the place of strips.
constexpr std::int64_t kMostStrippedEntries = 1024;

std::int64_t parts(std::int64_t whole, std::int64_t part) { return (whole + part - 1) / part; }

}  // namespace

TableGradient::TableGradient(const LogitTable& table_, bool of_gate_, const AttentionParams& call)
    : table(table_), of_gate(of_gate_) {
  (table.batch_stride == 0 ? batch_sharers : batch_tables) = call.batch;
  (table.head_stride == 0 ? head_sharers : head_tables) = call.heads;
  if (has_own_entries()) return;
  if (table.kind == TableKind::kSlopes) columns = kSlopeSums;
  if (table.kind == TableKind::kSlots) columns = table.columns;
  if (table.kind == TableKind::kBlocks) {
    // Tables of larger blocks are of the whole; those of single tokens have the part's queries.
    const WholeTokens& whole = call.whole;
    rows = parts(whole.queries && table.block > 1 ? whole.n_q : call.n_q, table.block);
    columns = parts(whole.keys ? whole.n_k : call.n_k, table.block);
  }
  if (table.kind == TableKind::kBlocks && entries() > kMostStrippedEntries) {
    rows_of_owner = parts(kMaxTile, table.block);
    owners = parts(rows, rows_of_owner);
    return;
  }
  rows_of_owner = rows;
  const auto bytes = static_cast<std::int64_t>(sizeof(double)) * tables() * entries();
  const std::int64_t most = std::min({kTargetBlocks / tables(), kMostPartialBytes / bytes,
                                      sharers() * parts(call.n_q, kLeastRows)});
  strips = std::max<std::int64_t>(1, most);
}

bool TableGradient::has_own_entries() const {
  return table.row_stride != 0 && (table.kind == TableKind::kSlots ||
                                   (table.kind == TableKind::kBlocks && table.block == 1));
}

std::int64_t TableGradient::partial_bytes() const {
  if (has_own_entries()) return 0;
  return tables() * strips * entries() * static_cast<std::int64_t>(sizeof(double));
}

}  // namespace sparse_attn::cuda
