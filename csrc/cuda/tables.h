// Gradients of tables: which heads share a table, and how the work is divided among thread blocks.
// No CUDA in here.
//
// Where each pair of a head has an entry of its own, the tiles of rows write to the table; heads
// that share it take turns. Elsewhere pairs of many tiles share an entry: `strips` of the tiles are
// summed in double, each by one block in a fixed order and in a partial table of its own, and added
// up at the end. If the table is large itself, there is one partial table in its place, and each
// block owns some of its rows and goes to the tiles that they lie in.
#pragma once

#include <cstdint>

#include "cuda/args.h"
#include "host_device.h"

namespace sparse_attn::cuda {

/// Columns of the partial tables of slopes: one for each warp of a block.
constexpr int kSlopeSums = 8;

struct TableGradient {
  LogitTable table;  // to be filled
  bool of_gate = false;

  // Tables and the heads of queries that share one, (batch, heads) each.
  std::int64_t batch_tables = 1, head_tables = 1;
  std::int64_t batch_sharers = 1, head_sharers = 1;

  // Of tables whose entries several pairs of a head share.
  double* partials = nullptr;  // (tables, strips, rows, columns)
  std::int64_t rows = 1, columns = 1;
  std::int64_t strips = 1;
  std::int64_t owners = 1;
  std::int64_t rows_of_owner = 1;

  TableGradient(const LogitTable& table, bool of_gate, const AttentionParams& call);

  bool has_own_entries() const;
  std::int64_t partial_bytes() const;
  std::int64_t sum_blocks() const { return tables() * strips * owners; }

  SPARSE_ATTN_HOST_DEVICE std::int64_t tables() const { return batch_tables * head_tables; }
  SPARSE_ATTN_HOST_DEVICE std::int64_t sharers() const { return batch_sharers * head_sharers; }
  SPARSE_ATTN_HOST_DEVICE std::int64_t entries() const { return rows * columns; }

  /// The number of batch x heads of a table's sharer.
  SPARSE_ATTN_HOST_DEVICE std::int64_t head(std::int64_t number, std::int64_t sharer) const {
    const std::int64_t heads = head_tables * head_sharers;
    return (number / head_tables + sharer / head_sharers) * heads + number % head_tables +
           sharer % head_sharers;
  }
  /// Where a table begins.
  SPARSE_ATTN_HOST_DEVICE std::int64_t offset(std::int64_t number) const {
    return number / head_tables * table.batch_stride + number % head_tables * table.head_stride;
  }
};

struct TableArguments {
  Arguments sweep;
  TableGradient gradient;
  std::int64_t sharer = 0;  // whose turn it is, where pairs have entries of their own
  std::int64_t tasks = 0;   // of each head, or rows of its lists
};

using TableLaunch = void (*)(std::int64_t blocks, void* stream, const TableArguments& arguments);

}  // namespace sparse_attn::cuda
