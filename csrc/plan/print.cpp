// A plan in words, for debugging and for the curious.
#include <sstream>

#include "plan/plan.h"

namespace sparse_attn {
namespace {

void print_tile(std::ostream& out, const Tile& tile, const std::vector<std::int64_t>& list) {
  if (tile.list >= 0) {
    const auto first = list.begin() + static_cast<std::ptrdiff_t>(tile.list);
    out << "{";
    for (std::int32_t i = 0; i < tile.count; ++i) out << (i ? " " : "") << first[i];
    out << "}";
    return;
  }
  out << tile.start << ".." << tile.start + static_cast<std::int64_t>(tile.step) * (tile.count - 1);
  if (tile.step > 1) out << " by " << tile.step;
}

}  // namespace

std::string Plan::to_string() const {
  std::ostringstream out;
  out << "plan: " << sizes.n_q << " queries x " << sizes.n_k << " keys, tiles " << tile.rows
      << " x " << tile.keys << ", " << pairs << " pairs, " << visited << " visited, "
      << masks.size() << " masks, " << bytes() << " bytes\n";
  for (const Pass& pass : passes) {
    out << "pass in steps of " << pass.step << "\n";
    for (const RowTile& row : pass.row_tiles) {
      out << "  rows ";
      print_tile(out, row.rows, token_list);
      out << ": keys";
      for (std::uint32_t r = row.first_run; r < row.end_run; ++r) {
        const Run& run = pass.runs[r];
        for (std::int32_t i = 0; i < run.count; ++i) {
          out << " ";
          print_tile(out, pass.key_tiles[static_cast<std::size_t>(run.key_tile + i)], token_list);
          if (run.mask != kFull) out << " (mask " << run.mask << ")";
        }
      }
      out << "\n";
    }
  }
  if (!lists->keys.empty()) out << "lists of " << lists->keys.size() << " single keys\n";
  return out.str();
}

}  // namespace sparse_attn
