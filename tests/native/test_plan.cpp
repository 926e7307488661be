// Plans against the dense definition, their cut into chunks, their growth, and the cache.
#include <memory>
#include <thread>
#include <tuple>
#include <utility>

#include "check.h"
#include "patterns/union.h"
#include "plan/cache.h"
#include "plan/lists.h"
#include "plan/partition.h"
#include "plan/plan.h"
#include "plan/seen.h"
#include "random_patterns.h"

namespace {

using namespace sparse_attn;

const std::vector<TileShape> kTileShapes{{64, 64}, {64, 64}, {32, 32}, {16, 64}, {64, 16},
                                         {7, 13},  {8, 8},   {1, 64},  {64, 1},  {5, 3}};

template <class T>
std::size_t index(T i) {
  return static_cast<std::size_t>(i);
}

// ---- one plan against the dense definition
// -------------------------------------------------------

/// The key tiles of a pass: first a partition of all keys, then tiles of listed keys.
void check_key_tiles(const Plan& plan, const Pass& pass) {
  std::vector<int> seen(index(plan.sizes.n_k));
  CHECK(pass.affine_key_tiles <= static_cast<std::int64_t>(pass.key_tiles.size()));
  for (std::size_t t = 0; t < pass.key_tiles.size(); ++t) {
    const Tile& tile = pass.key_tiles[t];
    const bool affine = static_cast<std::int64_t>(t) < pass.affine_key_tiles;
    CHECK_EQUAL(tile.list < 0, affine);
    CHECK(1 <= tile.count && tile.count <= plan.tile.keys);
    std::int64_t last = -1;
    for (int i = 0; i < tile.count; ++i) {
      const std::int64_t key = token(tile, plan.token_list.data(), i);
      CHECK(last < key && key < plan.sizes.n_k);
      last = key;
      seen[index(key)] += affine;
    }
  }
  CHECK(std::all_of(seen.begin(), seen.end(), [](int times) { return times == 1; }));
}

std::uint64_t low_bits(std::int64_t n) { return n == 0 ? 0 : ~std::uint64_t{0} >> (64 - n); }

/// Pairs of a tile that a CPU computes: for every 16 rows the keys from the first to the last seen.
std::int64_t computed_pairs(const Plan& plan, std::int32_t id, int rows, int keys) {
  std::int64_t pairs = 0;
  for (int r = 0; r < rows; r += 16) {
    int first = keys, last = -1;
    const int count = std::min(16, rows - r);
    for (int k = 0; k < keys; ++k) {
      const std::uint64_t bits = id == kFull ? ~std::uint64_t{0} : plan.masks[index(id)][index(k)];
      if ((bits >> r & low_bits(count)) == 0) continue;
      first = std::min(first, k);
      last = k;
    }
    if (last >= first) pairs += count * (last - first + 1);
  }
  return pairs;
}

/// Adds what a row tile visits to `covered` (query, key), for the rows that it owns. Returns the
/// pairs that are computed.
std::int64_t walk(const Plan& plan, const Pass& pass, const RowTile& row,
                  std::vector<int>& covered) {
  std::int64_t visited = 0;
  std::vector<std::int32_t> tiles;
  for (std::uint32_t r = row.first_run; r < row.end_run; ++r) {
    const Run& run = pass.runs[r];
    CHECK(run.count >= 1);
    CHECK(run.mask == kFull || run.count == 1);
    CHECK(run.mask >= kFull && run.mask < static_cast<std::int32_t>(plan.masks.size()));
  }
  const Run* runs = pass.runs.data();
  for_each_visit(runs + row.first_run, runs + row.end_run, [&](std::int32_t t, std::int32_t id) {
    tiles.push_back(t);
    const Tile& keys = pass.key_tiles[index(t)];
    visited += computed_pairs(plan, id, row.rows.count, keys.count);
    for (int k = 0; k < kMaxTile; ++k) {
      std::uint64_t bits = id == kFull ? low_bits(row.rows.count) : plan.masks[index(id)][index(k)];
      CHECK_EQUAL(bits & ~low_bits(row.rows.count), 0u);
      if (k >= keys.count) {
        if (id != kFull) CHECK_EQUAL(bits, 0u);
        continue;
      }
      const std::int64_t key = token(keys, plan.token_list.data(), k);
      for (bits &= row.owned; bits != 0; bits &= bits - 1) {
        const std::int64_t query = token(row.rows, plan.token_list.data(), __builtin_ctzll(bits));
        ++covered[index(query * plan.sizes.n_k + key)];
      }
    }
  });
  std::sort(tiles.begin(), tiles.end());
  CHECK(std::adjacent_find(tiles.begin(), tiles.end()) == tiles.end());
  return visited;
}

/// Adds the pairs of the lists to `covered`; returns their number. The transpose holds the same.
std::int64_t walk_lists(const Plan& plan, std::vector<int>& covered) {
  const Lists& lists = *plan.lists;
  if (lists.keys.empty()) return 0;
  CHECK_EQUAL(lists.starts.size(), index(plan.sizes.n_q + 1));
  CHECK_EQUAL(lists.starts.back(), static_cast<std::int64_t>(lists.keys.size()));
  const Lists queries = transposed(lists, plan.sizes.n_k);
  CHECK_EQUAL(queries.starts.size(), index(plan.sizes.n_k + 1));
  CHECK_EQUAL(queries.keys.size(), lists.keys.size());
  for (std::int64_t q = 0; q < plan.sizes.n_q; ++q) {
    CHECK(lists.starts[index(q)] <= lists.starts[index(q + 1)]);
    for (std::int64_t i = lists.starts[index(q)]; i < lists.starts[index(q + 1)]; ++i) {
      const std::int64_t key = lists.keys[index(i)];
      CHECK(0 <= key && key < plan.sizes.n_k);
      ++covered[index(q * plan.sizes.n_k + key)];
      const auto begin = queries.keys.begin();
      CHECK(std::binary_search(begin + queries.starts[index(key)],
                               begin + queries.starts[index(key + 1)], q));
    }
  }
  return static_cast<std::int64_t>(lists.keys.size());
}

/// Holds a plan to the pairs that it should have.
void check_plan(const Plan& plan, const std::vector<char>& expected) {
  const Sizes sizes = plan.sizes;
  const TileShape tile = plan.tile;
  std::vector<int> covered(index(sizes.n_q * sizes.n_k));
  std::int64_t visited = walk_lists(plan, covered);
  CHECK(!plan.passes.empty());
  for (const Pass& pass : plan.passes) {
    const bool first = &pass == &plan.passes.front();
    check_key_tiles(plan, pass);
    std::vector<int> owners(index(sizes.n_q));
    std::uint32_t runs = 0;
    for (const RowTile& row : pass.row_tiles) {
      CHECK_EQUAL(row.first_run, runs);
      CHECK(row.first_run <= row.end_run);
      runs = row.end_run;
      CHECK(1 <= row.rows.count && row.rows.count <= tile.rows);
      CHECK(row.owned != 0 && (row.owned & ~low_bits(row.rows.count)) == 0);
      for (int i = 0; i < row.rows.count; ++i) {
        const std::int64_t query = token(row.rows, plan.token_list.data(), i);
        CHECK(0 <= query && query < sizes.n_q);
        owners[index(query)] += static_cast<int>(row.owned >> i & 1);
      }
      visited += walk(plan, pass, row, covered);
    }
    CHECK_EQUAL(runs, pass.runs.size());
    for (const int times : owners) CHECK(first ? times == 1 : times <= 1);
  }
  std::int64_t pairs = 0;
  for (std::size_t p = 0; p < expected.size(); ++p) {
    pairs += expected[p];
    CHECK_EQUAL(covered[p], static_cast<int>(expected[p]));
  }
  CHECK_EQUAL(plan.pairs, pairs);
  CHECK_EQUAL(plan.visited, visited);
  CHECK(plan.bytes() > 0);
  CHECK(plan.to_string().find(std::to_string(pairs) + " pairs") != std::string::npos);
}

void check_plan(const Expression& expression, Sizes sizes, TileShape tile) {
  const Terms terms = expand(expression, sizes);
  const std::vector<char> expected = dense(expression, sizes);
  check_plan(build_plan(terms, sizes, tile), expected);
  check_plan(build_plan(terms, sizes, tile, Listing::kAll), expected);
  check_plan(choose_plan(terms, sizes), expected);
}

/// Layouts and lists of keys, alone and with other patterns.
void test_plans_of_tensors() {
  Random random(3);
  for (int i = 0; i < 300; ++i) {
    const Sizes sizes = random_sizes(random, i % 5 == 0 ? 200 : 60);
    const std::int64_t block = random.pick<std::int64_t>({1, 3, 16, 40});
    const std::int64_t rows = (sizes.n_q + block - 1) / block,
                       columns = (sizes.n_k + block - 1) / block;
    std::vector<std::uint8_t> layout(index(rows * columns));
    const int density = random.pick<int>({3, 30, 97});
    for (std::uint8_t& byte : layout) byte = random.chance(density);
    const std::int64_t width = random.between(0, 9);
    std::vector<std::int64_t> indices(index(sizes.n_q * width)), counts(index(sizes.n_q));
    for (std::int64_t& key : indices) key = random.between(0, sizes.n_k - 1);
    for (std::int64_t& count : counts) count = random.between(0, width);
    const PatternTensor tensors[] = {
        {layout.data(), columns}, {indices.data(), width}, {counts.data(), 1}};
    const Expression of_layout{Word::kBlockLayout, {block}, {}, 0},
        of_lists{Word::kKeyLists, {1}, {}, 1};

    std::vector<char> layout_pairs, list_pairs(index(sizes.n_q * sizes.n_k));
    for (std::int64_t q = 0; q < sizes.n_q; ++q) {
      for (std::int64_t k = 0; k < sizes.n_k; ++k)
        layout_pairs.push_back(layout[index(q / block * columns + k / block)] != 0);
      for (std::int64_t c = 0; c < counts[index(q)]; ++c)
        list_pairs[index(q * sizes.n_k + indices[index(q * width + c)])] = 1;
    }
    const Expression other = random_expression(random, sizes.n_k, 1);
    const std::vector<char> other_pairs = dense(other, sizes);
    check::context = to_string(other, sizes) + " with blocks of " + std::to_string(block);
    const auto check = [&](const Expression& expression, auto expected) {
      const Terms terms = expand(expression, sizes, tensors);
      std::vector<char> pairs;
      for (std::size_t p = 0; p < other_pairs.size(); ++p)
        pairs.push_back(expected(layout_pairs[p] != 0, list_pairs[p] != 0, other_pairs[p] != 0));
      check_plan(build_plan(terms, sizes, random.pick(kTileShapes)), pairs);
      check_plan(choose_plan(terms, sizes), pairs);
    };
    check(of_layout, [](bool a, bool, bool) { return a; });
    check(of_lists, [](bool, bool b, bool) { return b; });
    check(any_of({of_layout, of_lists}), [](bool a, bool b, bool) { return a || b; });
    check(all_of({of_layout, of_lists}), [](bool a, bool b, bool) { return a && b; });
    check(any_of({of_lists, other}), [](bool, bool b, bool c) { return b || c; });
    check(all_of({of_lists, other}), [](bool, bool b, bool c) { return b && c; });
    check(any_of({of_layout, other}), [](bool a, bool, bool c) { return a || c; });
    check(all_of({of_layout, other}), [](bool a, bool, bool c) { return a && c; });

    if (width == 0) continue;
    indices[0] = sizes.n_k;
    counts[0] = width;
    CHECK_THROWS(expand(of_lists, sizes, tensors), std::invalid_argument);
    indices[0] = -1;
    CHECK_THROWS(expand(of_lists, sizes, tensors), std::invalid_argument);
    indices[0] = 0;
    counts[0] = width + 1;
    CHECK_THROWS(expand(of_lists, sizes, tensors), std::invalid_argument);
    counts[0] = -1;
    CHECK_THROWS(expand(of_lists, sizes, tensors), std::invalid_argument);
  }
  check::context.clear();
}

void test_random_plans() {
  Random random(1);
  for (int i = 0; i < 900; ++i) {
    const Sizes sizes = random_sizes(random, i % 8 == 0 ? 300 : i % 2 == 0 ? 90 : 20);
    const Expression expression = random.chance(4) ? random_large_product(random, sizes.n_k)
                                                   : random_expression(random, sizes.n_k);
    const TileShape tile = random.pick(kTileShapes);
    check::context = to_string(expression, sizes) + " in tiles of " + std::to_string(tile.rows) +
                     " x " + std::to_string(tile.keys);
    check_plan(expression, sizes, tile);
  }
  check::context.clear();
}

/// Ascending runs of some of `length` tokens: (start, stop).
std::vector<std::pair<std::int64_t, std::int64_t>> some_tokens(Random& random,
                                                               std::int64_t length) {
  std::vector<std::pair<std::int64_t, std::int64_t>> runs;
  std::int64_t at = random.chance(50) ? 0 : random.between(0, length / 2);
  while (at < length) {
    const std::int64_t stop = random.chance(30) ? length : random.between(at + 1, length);
    runs.push_back({at, stop});
    at = stop + random.between(1, length);
  }
  return runs;
}

/// A part of a sequence: its words, and the token of each place.
struct PlacedTokens {
  Expression expression;
  std::vector<std::int64_t> queries, keys;  // -1 where there is none
  std::vector<char> blind;                  // by query of the whole
};

PlacedTokens random_part(Random& random, const Expression& whole, Sizes sizes) {
  PlacedTokens part;
  std::vector<std::int64_t> words{sizes.n_q, sizes.n_k};
  const auto queries = some_tokens(random, sizes.n_q), keys = some_tokens(random, sizes.n_k);
  words.push_back(static_cast<std::int64_t>(queries.size()));
  for (const auto& [start, stop] : queries) {
    words.insert(words.end(), {start, stop});
    for (std::int64_t token = start; token < stop; ++token) part.queries.push_back(token);
  }
  words.push_back(static_cast<std::int64_t>(keys.size()));
  for (const auto& [start, stop] : keys) {
    const auto gap = index(random.chance(40) ? random.between(0, 9) : 0);
    part.keys.insert(part.keys.end(), gap, -1);
    words.insert(words.end(), {static_cast<std::int64_t>(part.keys.size()), start, stop});
    for (std::int64_t token = start; token < stop; ++token) part.keys.push_back(token);
  }
  if (random.chance(30)) part.keys.push_back(-1);
  part.blind.resize(index(sizes.n_q));
  const auto blind = random.chance(40) ? some_tokens(random, sizes.n_q)
                                       : std::vector<std::pair<std::int64_t, std::int64_t>>{};
  words.push_back(static_cast<std::int64_t>(blind.size()));
  for (const auto& [start, stop] : blind) {
    words.insert(words.end(), {start, stop});
    std::fill(part.blind.begin() + start, part.blind.begin() + stop, char{1});
  }
  part.expression = {Word::kPart, words, {whole}, 0};
  return part;
}

/// Some queries against some keys have the pairs that the whole pattern gives them.
void test_random_parts() {
  Random random(4);
  for (int i = 0; i < 900; ++i) {
    const Sizes whole = random_sizes(random, i % 8 == 0 ? 300 : i % 2 == 0 ? 90 : 20);
    const Expression expression = random_expression(random, whole.n_k);
    const PlacedTokens part = random_part(random, expression, whole);
    const auto words = encode(part.expression);
    CHECK(encode(parse(words.data(), static_cast<std::int64_t>(words.size()))) == words);
    const Sizes sizes{static_cast<std::int64_t>(part.queries.size()),
                      static_cast<std::int64_t>(part.keys.size())};
    check::context = to_string(part.expression, sizes);
    std::vector<char> pairs;
    Seen expected{std::vector<std::uint8_t>(part.queries.size()),
                  std::vector<std::uint8_t>(part.keys.size())};
    for (std::size_t q = 0; q < part.queries.size(); ++q) {
      for (std::size_t k = 0; k < part.keys.size(); ++k) {
        const std::int64_t query = part.queries[q], key = part.keys[k];
        const bool sees_it =
            key >= 0 && !part.blind[index(query)] && sees(expression, whole, query, key);
        pairs.push_back(sees_it);
        expected.queries[q] |= sees_it;
        expected.keys[k] |= sees_it;
      }
    }
    const Terms terms = expand(part.expression, sizes);
    const Plan plan = build_plan(terms, sizes, random.pick(kTileShapes));
    check_plan(plan, pairs);
    check_plan(build_plan(terms, sizes, random.pick(kTileShapes), Listing::kAll), pairs);
    check_plan(choose_plan(terms, sizes), pairs);
    Seen seen;
    add_seen(plan, seen);
    CHECK(seen.queries == expected.queries);
    CHECK(seen.keys == expected.keys);
  }
  check::context.clear();
}

/// A dilated window keeps its order where residue classes are the same in both numberings.
void test_classes_of_parts() {
  const auto first_step = [](std::int64_t first_query, std::int64_t first_place) {
    const Expression part{Word::kPart,
                          {100, 100, 1, first_query, first_query + 20, 1, first_place, 12, 42, 0},
                          {window(9, 9, 3)},
                          0};
    const Sizes sizes{20, first_place + 30};
    const Plan plan = build_plan(expand(part, sizes), sizes, {});
    return plan.passes[0].step;
  };
  // The first query stands at position first_place + 10, key 12 at first_place.
  CHECK_EQUAL(first_step(40, 0), 3);
  CHECK_EQUAL(first_step(40, 5), 3);
  CHECK_EQUAL(first_step(41, 0), 1);
}

/// Those that users write, at lengths around the tile's.
void test_usual_plans() {
  const std::vector<Expression> expressions{
      full(),
      causal(),
      window(0, 0),
      window(20, 20),
      window(20, 0),
      window(5, 5, 2),
      window(5, 3, 70),
      window(kUnbounded, 0, 3),
      global_keys({0, 2}),
      global_queries({0, 1}),
      any_of({window(9, 9, 2), global_queries({0, 1})}),
      any_of({window(9, 9), global_keys({-1, 0, 0, 1}), global_queries({-1, 0, 0, 1})}),
      all_of({any_of({window(9, 0), global_keys({0, 1}), global_queries({0, 1})}), causal()}),
      any_of({window(9, 0), window(0, 9)}),
      any_of({window(4, 4), window(4, 4, 3), window(4, 4, 9)}),
      any_of({all_of({global_keys({0, 1}), causal()}), global_keys({-1, 0})}),
  };
  for (const std::int64_t n : {1, 2, 63, 64, 65, 129}) {
    for (const Sizes sizes : {Sizes{n, n}, Sizes{n, n + 70}, Sizes{n + 70, n}}) {
      for (const Expression& expression : expressions) {
        if (keys_needed(most_demanding_token(expression)) > sizes.n_k) continue;
        check::context = to_string(expression, sizes);
        check_plan(expression, sizes, {});
      }
    }
  }
  check::context.clear();
}

// ---- chunks
// --------------------------------------------------------------------------------------

/// (row tile, key tile, mask).
using Visit = std::tuple<std::int32_t, std::int32_t, std::int32_t>;

/// The slots of consecutive reductions are [0, count), in order.
void check_reductions(const Array<Reduction>& reductions, std::int32_t count) {
  std::int32_t slot = 0;
  std::vector<std::int32_t> tiles;
  for (const Reduction& reduction : reductions) {
    CHECK_EQUAL(reduction.first_slot, slot);
    CHECK(reduction.first_slot < reduction.end_slot);
    slot = reduction.end_slot;
    tiles.push_back(reduction.tile);
  }
  CHECK_EQUAL(slot, count);
  std::sort(tiles.begin(), tiles.end());
  CHECK(std::adjacent_find(tiles.begin(), tiles.end()) == tiles.end());
}

/// The tile that each slot is reduced into.
std::vector<std::int32_t> tile_of_slots(const Array<Reduction>& reductions, std::int32_t count) {
  std::vector<std::int32_t> tiles(index(count), -1);
  for (const Reduction& reduction : reductions) {
    for (std::int32_t s = reduction.first_slot; s < reduction.end_slot; ++s)
      tiles[index(s)] = reduction.tile;
  }
  return tiles;
}

/// The segments are the pass, no more and no less; a row tile is either one segment, or several
/// with a slot each.
void check_segments(const Pass& pass, const PassView& view) {
  std::vector<Visit> expected, got;
  for (std::size_t r = 0; r < pass.row_tiles.size(); ++r) {
    const RowTile& row = pass.row_tiles[r];
    for_each_visit(pass.runs.data() + row.first_run, pass.runs.data() + row.end_run,
                   [&](std::int32_t key_tile, std::int32_t mask) {
                     expected.emplace_back(r, key_tile, mask);
                   });
  }
  std::vector<int> whole(pass.row_tiles.size()), slots(index(view.row_slots));
  std::vector<std::int32_t> last_slot(pass.row_tiles.size(), -1);
  const auto tile_of_slot = tile_of_slots(view.row_reductions, view.row_slots);
  for (const Segment& segment : view.segments) {
    if (segment.slot < 0) {
      ++whole[index(segment.row_tile)];
    } else {
      CHECK(segment.slot > last_slot[index(segment.row_tile)]);  // keys stay in order
      last_slot[index(segment.row_tile)] = segment.slot;
      ++slots[index(segment.slot)];
      CHECK_EQUAL(tile_of_slot[index(segment.slot)], segment.row_tile);
    }
    for_each_visit(view.runs.data + segment.first_run, view.runs.data + segment.end_run,
                   [&](std::int32_t key_tile, std::int32_t mask) {
                     got.emplace_back(segment.row_tile, key_tile, mask);
                   });
  }
  for (const int times : slots) CHECK_EQUAL(times, 1);
  for (std::size_t r = 0; r < whole.size(); ++r) CHECK_EQUAL(whole[r], last_slot[r] < 0 ? 1 : 0);
  std::sort(expected.begin(), expected.end());
  std::sort(got.begin(), got.end());
  CHECK(got == expected);
}

/// Backward: no two chunks add to the same rows of the key gradients.
void check_shared_tiles(const Pass& pass, const PassView& view) {
  const auto tile_of_slot = tile_of_slots(view.key_reductions, view.key_slots);
  std::vector<int> direct(pass.key_tiles.size()), slots(index(view.key_slots));
  std::uint32_t shared = 0;
  for (const Chunk& chunk : view.chunks) {
    CHECK_EQUAL(chunk.first_shared, shared);
    shared = chunk.end_shared;
    std::vector<char> touched(pass.key_tiles.size()), has_slot(pass.key_tiles.size());
    for (std::uint32_t s = chunk.first_segment; s < chunk.end_segment; ++s) {
      const Segment& segment = view.segments[s];
      for_each_visit(view.runs.data + segment.first_run, view.runs.data + segment.end_run,
                     [&](std::int32_t tile, std::int32_t) { touched[index(tile)] = 1; });
    }
    for (std::uint32_t i = chunk.first_shared; i < chunk.end_shared; ++i) {
      const SharedTile& tile = view.shared_tiles[i];
      CHECK(touched[index(tile.key_tile)]);
      CHECK(!has_slot[index(tile.key_tile)]);
      has_slot[index(tile.key_tile)] = 1;
      ++slots[index(tile.slot)];
      CHECK_EQUAL(tile_of_slot[index(tile.slot)], tile.key_tile);
    }
    for (std::size_t t = 0; t < touched.size(); ++t) {
      if (!touched[t] || has_slot[t]) continue;
      ++direct[t];
      const bool gathered = static_cast<std::int64_t>(t) >= pass.affine_key_tiles;
      CHECK(!gathered || view.chunks.size == 1);
    }
  }
  CHECK_EQUAL(shared, view.shared_tiles.size);
  for (const int times : direct) CHECK(times <= 1);
  for (const int times : slots) CHECK_EQUAL(times, 1);
}

/// How many slots the schedule has in all.
std::int64_t check_schedule(const std::shared_ptr<const Plan>& plan, Direction direction,
                            int chunks) {
  const Schedule schedule(plan, direction, chunks);
  CHECK(&schedule.plan() == plan.get());
  const PlanView& view = schedule.view();
  CHECK_EQUAL(index(view.passes.size), plan->passes.size());
  CHECK(view.token_list == plan->token_list.data());
  std::int64_t slots = 0;
  for (std::size_t p = 0; p < plan->passes.size(); ++p) {
    const Pass& pass = plan->passes[p];
    const PassView& pass_view = view.passes[static_cast<std::int64_t>(p)];
    CHECK(pass_view.row_tiles.data == pass.row_tiles.data());
    CHECK(pass_view.key_tiles.data == pass.key_tiles.data());
    CHECK(1 <= pass_view.chunks.size && pass_view.chunks.size <= chunks);
    std::uint32_t segment = 0;
    for (const Chunk& chunk : pass_view.chunks) {
      CHECK_EQUAL(chunk.first_segment, segment);
      CHECK(chunk.first_segment <= chunk.end_segment);
      segment = chunk.end_segment;
    }
    CHECK_EQUAL(segment, pass_view.segments.size);
    check_segments(pass, pass_view);
    check_reductions(pass_view.row_reductions, pass_view.row_slots);
    check_reductions(pass_view.key_reductions, pass_view.key_slots);
    if (direction == Direction::kBackward) check_shared_tiles(pass, pass_view);
    if (direction == Direction::kForward) CHECK_EQUAL(pass_view.shared_tiles.size, 0);
    // Slots need no more memory than the tensors that they add up to.
    CHECK(pass_view.key_slots <= pass.affine_key_tiles);
    CHECK(pass_view.row_slots <= std::max<std::int64_t>(pass_view.row_tiles.size, 64));
    slots += pass_view.row_slots + pass_view.key_slots;
  }
  return slots;
}

void test_schedules() {
  Random random(2);
  std::int64_t slots = 0;
  for (int i = 0; i < 250; ++i) {
    const Sizes sizes = random_sizes(random, i % 4 == 0 ? 300 : 80);
    const Expression expression =
        i % 5 == 0 ? any_of({window(9, 9), global_keys({0, 1}), global_queries({0, 1})})
                   : random_expression(random, sizes.n_k);
    const TileShape tile = random.pick(kTileShapes);
    check::context = to_string(expression, sizes) + " in tiles of " + std::to_string(tile.rows) +
                     " x " + std::to_string(tile.keys);
    const auto plan =
        std::make_shared<const Plan>(build_plan(expand(expression, sizes), sizes, tile));
    for (int chunks = 1; chunks <= 9; ++chunks) {
      slots += check_schedule(plan, Direction::kForward, chunks);
      slots += check_schedule(plan, Direction::kBackward, chunks);
    }
  }
  check::context.clear();
  CHECK(slots > 1000);
}

/// The visits of the chunk that has most, as a multiple of the mean.
double most_visits(const PassView& pass) {
  std::int64_t most = 0, total = 0;
  for (const Chunk& chunk : pass.chunks) {
    std::int64_t visits = 0;
    for (std::uint32_t s = chunk.first_segment; s < chunk.end_segment; ++s) {
      for_each_visit(pass.runs.data + pass.segments[s].first_run,
                     pass.runs.data + pass.segments[s].end_run,
                     [&](std::int32_t, std::int32_t) { ++visits; });
    }
    most = std::max(most, visits);
    total += visits;
  }
  return static_cast<double>(most * pass.chunks.size) / static_cast<double>(total);
}

/// A head of its own is cut into many shares, and each share gets about as much; backward, slots
/// for the key tiles that two chunks touch limit their number.
void test_shares_are_even() {
  const Sizes sizes{8192, 8192};
  const auto check_even = [&](const Expression& expression, std::int64_t least_backward) {
    const auto plan = std::make_shared<const Plan>(build_plan(expand(expression, sizes), sizes));
    CHECK_EQUAL(chunk_count(*plan, 32), 1);
    CHECK_EQUAL(chunk_count(*plan, 1000000), 1);
    const int chunks = chunk_count(*plan, 1);
    CHECK(chunks >= 16);
    CHECK_EQUAL(chunks & (chunks - 1), 0);
    for (const Direction direction : {Direction::kForward, Direction::kBackward}) {
      const Schedule schedule(plan, direction, chunks);
      const PassView& pass = schedule.view().passes[0];
      CHECK(pass.chunks.size >= (direction == Direction::kForward ? chunks : least_backward));
      CHECK(most_visits(pass) < 1.15);
    }
  };
  check_even(any_of({window(256, 256), global_keys({0, 2}), global_queries({0, 2})}), 8);
  // Whole rows are shared out so that they even out what the other rows leave uneven.
  check_even(any_of({{Word::kBlockWindow, {64, 1, 1}, {}, 0},
                     {Word::kRandomBlocks, {3, 64, 0}, {}, 0},
                     {Word::kEdgeKeys, {64, 1, 1}, {}, 0},
                     {Word::kEdgeQueries, {64, 1, 1}, {}, 0}}),
             2);
}

// ---- growth
// --------------------------------------------------------------------------------------

/// Memory and work grow with the length, not with its square.
void test_growth_is_linear() {
  const std::vector<Expression> expressions{
      window(256, 256),
      window(256, 0, 4),
      window(30, 30, 8),
      any_of({window(64, 64), window(64, 64, 8)}),
      any_of({window(256, 256), global_keys({0, 16}), global_queries({0, 16})}),
      all_of({any_of({window(256, 0), global_keys({0, 1}), global_queries({0, 1})}), causal()}),
      any_of({all_of({global_keys({0, 1}), causal()}), window(7, 0, 3), global_keys({-1, 0})}),
  };
  for (const Expression& expression : expressions) {
    const auto plan_for = [&](std::int64_t n) {
      return std::make_shared<const Plan>(build_plan(expand(expression, {n, n}), {n, n}));
    };
    const std::int64_t n = 8192, factor = 8;
    const auto small = plan_for(n), large = plan_for(factor * n);
    check::context = to_string(expression, {n, n});
    CHECK(large->visited <= small->visited * factor * 11 / 10);
    CHECK(large->bytes() <= small->bytes() * factor * 11 / 10);
    CHECK(large->bytes() <= 64 * factor * n);  // head size 16 in float32 needs as much
  }
  check::context.clear();
}

/// Tiles in the right order do little more than is needed.
void test_overhead() {
  const std::int64_t n = 4096;
  const auto overhead = [&](const Expression& expression) {
    const Plan plan = build_plan(expand(expression, {n, n}), {n, n});
    return static_cast<double>(plan.visited) / static_cast<double>(plan.pairs);
  };
  CHECK(overhead(full()) == 1.0);
  CHECK(overhead(causal()) < 1.02);
  CHECK(overhead(window(256, 256)) < 1.04);
  CHECK(overhead(window(256, 256, 4)) < 1.04);
  CHECK(overhead(any_of({window(256, 256), global_keys({0, 64}), global_queries({0, 64})})) < 1.2);
  const Expression segments{Word::kBlockWindow, {128, 0, 0}, {}, 0},
      summaries{Word::kPeriodicKeys, {128, 8}, {}, 0};
  CHECK(overhead(all_of({any_of({segments, summaries}), causal()})) < 1.35);
  CHECK(overhead({Word::kRandomBlocks, {3, 64, 5}, {}, 0}) == 1.0);
  CHECK(overhead({Word::kCheckerboard, {1}, {}, 0}) == 1.0);
  CHECK(overhead({Word::kRadial, {512}, {}, 0}) < 1.25);
  CHECK(overhead({Word::kRandomTokens, {std::int64_t{1} << 27, 5}, {}, 0}) == 1.0);

  const Sizes long_sizes{4 * n, 4 * n};
  const auto chosen = [&](const Expression& expression) {
    const Plan plan = choose_plan(expand(expression, long_sizes), long_sizes);
    return static_cast<double>(plan.visited) / static_cast<double>(plan.pairs);
  };
  CHECK(chosen(any_of({window(127, 0), window(INT64_MAX, 0, 128)})) < 1.3);
  CHECK(chosen({Word::kBlockWindow, {48, 0, 0}, {}, 0}) == 1.0);
  CHECK(chosen({Word::kBlockWindow, {100, 1, 1}, {}, 0}) < 1.05);
  CHECK(chosen({Word::kRadial, {1}, {}, 0}) < 2.0);
}

// ---- the cache
// -----------------------------------------------------------------------------------

void test_cache() {
  clear_plan_cache();
  CHECK_EQUAL(plan_cache_size(), 0);
  const Sizes sizes{10, 10};
  const auto plan = plan_of(window(1, 1), sizes, nullptr);
  CHECK(plan_of(window(1, 1), sizes, nullptr) == plan);
  CHECK(plan_of(window(1, 2), sizes, nullptr) != plan);
  CHECK(plan_of(window(1, 1), {10, 11}, nullptr) != plan);
  CHECK(plan_of(window(1, 1), {11, 10}, nullptr) != plan);
  CHECK_EQUAL(plan_cache_size(), 4);
  CHECK_THROWS(plan_of(global_keys({0, 11}), sizes, nullptr), std::invalid_argument);
  CHECK_EQUAL(plan_cache_size(), 4);

  CHECK(!kept_schedule(window(1, 1), sizes, Direction::kForward, 8));
  const auto schedule = schedule_of(window(1, 1), sizes, nullptr, Direction::kForward, 8);
  CHECK(kept_schedule(window(1, 1), sizes, Direction::kForward, 8) == schedule);
  CHECK(!kept_schedule(window(1, 1), sizes, Direction::kForward, 9));
  CHECK(&schedule->plan() == plan.get());
  CHECK(schedule_of(window(1, 1), sizes, nullptr, Direction::kForward, 8) == schedule);
  CHECK(schedule_of(window(1, 1), sizes, nullptr, Direction::kBackward, 8) != schedule);
  CHECK(schedule_of(window(1, 1), sizes, nullptr, Direction::kForward, 8, 3) != schedule);
  CHECK_EQUAL(plan_cache_size(), 4);

  clear_plan_cache();
  CHECK_EQUAL(plan_cache_size(), 0);
  CHECK_EQUAL(plan->pairs, 28);  // whoever holds a plan keeps it
  CHECK(plan_of(window(1, 1), sizes, nullptr) != plan);
}

void test_cache_is_bounded() {
  clear_plan_cache();
  std::vector<std::weak_ptr<const Plan>> plans;
  const auto ask = [](std::int64_t left) { return plan_of(window(left, 1), {4, 4}, nullptr); };
  const std::int64_t many = 2000;
  const auto kept = ask(many);
  for (std::int64_t left = 0; left < many; ++left) {
    plans.push_back(ask(left));
    CHECK(ask(many) == kept);  // used again and again, so never the oldest
  }
  const std::int64_t capacity = plan_cache_size();
  CHECK(16 <= capacity && capacity <= 1024);
  const auto alive =
      std::count_if(plans.begin(), plans.end(), [](const auto& plan) { return !plan.expired(); });
  CHECK_EQUAL(alive, capacity - 1);
  for (std::int64_t left = 0; left < many; ++left) {
    CHECK_EQUAL(plans[index(left)].expired(), left < many - (capacity - 1));  // the oldest went
  }
  clear_plan_cache();
}

/// Large plans leave before there are many of them: together they stay below 128 MiB.
void test_cache_is_bounded_in_bytes() {
  clear_plan_cache();
  const std::int64_t n = std::int64_t{1} << 19;
  std::int64_t bytes = 0;
  for (std::int64_t i = 0; i < 10; ++i) {
    bytes += plan_of(window(1, 1, n / 2 + i), {n, n}, nullptr)->bytes();
    if (plan_cache_size() <= i) {
      CHECK(bytes > std::int64_t{128} << 20);
      break;
    }
    CHECK(bytes <= std::int64_t{128} << 20);
  }
  CHECK(plan_cache_size() < 10);
  for (std::int64_t left = 0; left < 20; ++left) plan_of(window(left, 0), {4, 4}, nullptr);
  CHECK(plan_cache_size() >= 20);  // those that left are no longer counted
  clear_plan_cache();
}

void test_cache_from_several_threads() {
  clear_plan_cache();
  constexpr int kThreads = 4, kPatterns = 40, kRounds = 50;
  std::vector<std::vector<std::shared_ptr<const Schedule>>> found(
      kThreads, std::vector<std::shared_ptr<const Schedule>>(kPatterns));
  std::vector<int> wrong(kThreads);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      Random random(static_cast<std::uint64_t>(t));
      for (int i = 0; i < kRounds * kPatterns; ++i) {
        const std::int64_t w = i < kPatterns ? i : random.between(0, kPatterns - 1);
        const auto schedule = schedule_of(window(w, 0), {50, 50}, nullptr, Direction::kForward, 1);
        auto& mine = found[index(t)][index(w)];
        if (mine && mine != schedule) ++wrong[index(t)];
        mine = schedule;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int count : wrong) CHECK_EQUAL(count, 0);
  CHECK_EQUAL(plan_cache_size(), kPatterns);
  for (int w = 0; w < kPatterns; ++w) {
    const Plan& plan = found[0][index(w)]->plan();
    CHECK_EQUAL(plan.pairs, (w + 1) * 50 - w * (w + 1) / 2);
    for (const auto& of_thread : found) CHECK(of_thread[index(w)] == found[0][index(w)]);
  }
  clear_plan_cache();
}

}  // namespace

int main() {
  test_usual_plans();
  test_random_plans();
  test_random_parts();
  test_classes_of_parts();
  test_plans_of_tensors();
  test_schedules();
  test_shares_are_even();
  test_growth_is_linear();
  test_overhead();
  test_cache();
  test_cache_is_bounded();
  test_cache_is_bounded_in_bytes();
  test_cache_from_several_threads();
  return check::report();
}
