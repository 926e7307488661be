#include "cuda/run.h"

#include <algorithm>
#include <iterator>

namespace sparse_attn::cuda {
namespace {

/// Lays arrays out one after the other, from a base that may be null to learn the size.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<std::uintptr_t>(base)) {}

  void* take(std::int64_t bytes) {
    constexpr std::int64_t kAlignment = 64;
    void* place = reinterpret_cast<void*>(base_ + static_cast<std::uintptr_t>(used_));
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return place;
  }
  template <class T>
  T* take_array(std::int64_t count) {
    return static_cast<T*>(take(count * static_cast<std::int64_t>(sizeof(T))));
  }
  std::int64_t used() const { return used_; }

 private:
  std::uintptr_t base_;
  std::int64_t used_ = 0;
};

/// A pass to be run: of the image, or one that the device makes.
struct PassAtHand {
  PassShape shape;
  const GridPass* table;
  std::int32_t plan_batch;
};

class Sequence {
 public:
  Sequence(const Kernels& kernels, const Call& call)
      : kernels_(kernels),
        call_(call),
        p_(call.params),
        real_(p_.dtype == DataType::kFloat64 ? 8 : 4),
        heads_(p_.batch * p_.heads),
        heads_kv_(p_.batch * p_.heads_kv) {
    arguments_.call = p_;
    arguments_.plan_heads = call.plan_heads;
    std::copy(std::begin(call.tensors), std::end(call.tensors), arguments_.tensors);
    for (const PassShape& pass : call.image->passes())
      passes_.push_back({pass, table_at(pass.table), call.plan_batch});
  }

  std::int64_t lay_out_forward(void* base) {
    Arena arena(base);
    add_global_passes(arena, kernels_.in_forward);
    if (sweeps() > 1) arguments_.rows = states(arena, heads_ * p_.n_q);
    if (const std::int64_t slots = most_slots(&PassShape::rows); slots > 0) {
      arguments_.slots_per_head = slots;
      arguments_.slots = states(arena, heads_ * slots * kMaxTile);
    }
    return arena.used();
  }

  void forward() {
    lay_out_forward(p_.workspace);
    make_global_passes();
    for (const PassAtHand& pass : passes_) {
      begin(pass);
      queue(sweeps_of(pass).forward, pass.shape.rows.tasks * heads_);
      reduce(kernels_.merge_states, pass.shape.rows, heads_);
      arguments_.first = false;
    }
    for (const DeviceLists& lists : all_lists()) {
      begin(lists, lists.keys_of_query);
      queue(list_sweeps().forward, blocks_for_rows(heads_ * p_.n_q));
    }
    if (sweeps() > 1) queue(kernels_.finish_states, blocks_for_rows(heads_ * p_.n_q));
  }

  std::int64_t lay_out_backward(void* base) {
    Arena arena(base);
    add_global_passes(arena, kernels_.in_backward);
    lay_out_deltas(arena);
    const std::int64_t slots =
        std::max(most_slots(&PassShape::rows) * heads_, most_slots(&PassShape::keys) * heads_kv_);
    if (slots > 0) {
      arguments_.slots_key = arena.take(slots * kMaxTile * p_.head_dim * real_);
      arguments_.slots_value = arena.take(slots * kMaxTile * p_.value_dim * real_);
    }
    return arena.used();
  }

  void backward(bool wide) {
    lay_out_backward(p_.workspace);
    make_global_passes();
    arguments_.grad_query = {p_.grad_query, wide, false};
    arguments_.grad_key = {p_.grad_key, wide, false};
    arguments_.grad_value = {p_.grad_value, wide, false};
    queue_deltas();
    for (const PassAtHand& pass : passes_) {
      begin(pass);
      sweep_rows(pass);
      sweep_keys(pass);
      set_add(true);  // the next pass finds the sums of this one
    }
    for (const DeviceLists& lists : all_lists()) {
      begin(lists, lists.keys_of_query);
      queue(list_sweeps().grad_query, blocks_for_rows(heads_ * p_.n_q));
      begin(lists, lists.queries_of_key);
      queue(list_sweeps().grad_key_value, blocks_for_rows(heads_kv_ * p_.n_k));
    }
  }

  // ---- along a tangent, and tables --------------------------------------------------------------

  std::int64_t lay_out_tangent(void* base) {
    Arena arena(base);
    add_global_passes(arena, kernels_.in_forward);
    arguments_.rows = states(arena, heads_ * p_.n_q);
    arguments_.slots_per_head = most_slots(&PassShape::rows);
    arguments_.slots = states(arena, heads_ * arguments_.slots_per_head * kMaxTile);
    return arena.used();
  }

  void tangent(const AlongKernels& along) {
    lay_out_tangent(p_.workspace);
    make_global_passes();
    for (const PassAtHand& pass : passes_) {
      begin(pass);
      queue(along.tangent, pass.shape.rows.tasks * heads_);
      reduce(along.merge_tangents, pass.shape.rows, heads_);
      arguments_.first = false;
    }
    for (const DeviceLists& lists : all_lists()) {
      begin(lists, lists.keys_of_query);
      queue(along.listed_tangent, blocks_for_rows(heads_ * p_.n_q));
    }
    queue(along.finish_tangents, blocks_for_rows(heads_ * p_.n_q));
  }

  std::int64_t lay_out_tables(void* base) {
    Arena arena(base);
    add_global_passes(arena, kernels_.in_backward);
    lay_out_deltas(arena);
    std::int64_t most = 0;
    for (const TableGradient& gradient : table_gradients())
      most = std::max(most, gradient.partial_bytes());
    partials_ = static_cast<double*>(arena.take(most));
    return arena.used();
  }

  void grad_tables(const AlongKernels& along) {
    lay_out_tables(p_.workspace);
    make_global_passes();
    queue_deltas();
    for (TableGradient& gradient : table_gradients()) {
      gradient.partials = partials_;
      arguments_.first = true;
      arguments_.plan_heads = call_.plan_heads;
      for (const PassAtHand& pass : passes_) {
        begin(pass);
        const std::int64_t tasks = pass.shape.rows.tasks;
        queue_table(gradient, along.table_entries, along.table_sums, tasks,
                    tasks * gradient.tables());
        arguments_.first = false;
      }
      for (const DeviceLists& lists : all_lists()) {
        begin(lists, lists.keys_of_query);
        queue_table(gradient, along.listed_table_entries, along.listed_table_sums, p_.n_q,
                    blocks_for_rows(p_.n_q * gradient.tables()));
      }
      if (gradient.has_own_entries()) continue;
      const std::int64_t entries = gradient.tables() * gradient.entries();
      along.add_strips((entries + kStripThreads - 1) / kStripThreads, call_.stream,
                       {arguments_, gradient});
    }
  }

  std::size_t sweeps() const {
    return call_.image->passes().size() + all_lists().size() + (call_.global.keys ? 2 : 0);
  }

 private:
  /// Those of the plans, and those that the device has made.
  std::vector<DeviceLists> all_lists() const {
    std::vector<DeviceLists> all;
    if (call_.image->keys_of_query() >= 0) {
      const auto at = [&](std::int64_t offset) {
        return reinterpret_cast<const ListsView*>(call_.base + offset);
      };
      all.push_back({at(call_.image->keys_of_query()), at(call_.image->queries_of_key()),
                     call_.plan_batch, call_.plan_heads});
    }
    if (call_.lists.keys_of_query) all.push_back(call_.lists);
    return all;
  }

  const GridPass* table_at(std::int64_t offset) const {
    return reinterpret_cast<const GridPass*>(call_.base + offset);
  }

  // ---- global tokens that only the device knows
  // --------------------------------------------------

  void add_global_passes(Arena& arena, const Grouping& grouping) {
    if (!call_.global.keys) return;
    const GlobalTokens& g = call_.global;
    add_global_pass(arena, grouping, true, call_.image->global_keys(), g.keys, g.key_counts,
                    g.capacity_keys);
    add_global_pass(arena, grouping, false, call_.image->global_queries(), g.queries,
                    g.query_counts, g.capacity_queries);
  }

  void add_global_pass(Arena& arena, const Grouping& grouping, bool of_keys, std::int64_t natural,
                       const std::int64_t* tokens, const std::int64_t* counts,
                       std::int64_t capacity) {
    const auto tiles = [](std::int64_t n) {
      return static_cast<std::int32_t>((n + kMaxTile - 1) / kMaxTile);
    };
    GlobalPass pass;
    pass.natural = table_at(natural);
    pass.tokens = tokens;
    pass.counts = counts;
    pass.capacity = capacity;
    pass.of_keys = of_keys;
    pass.batch = static_cast<std::int32_t>(p_.batch);
    pass.heads = call_.plan_heads;
    pass.natural_rows = tiles(p_.n_q);
    pass.natural_keys = tiles(p_.n_k);
    pass.group_rows = grouping.rows;
    pass.group_keys = grouping.keys;
    pass.passes = arena.take_array<GridPass>(pass.batch * pass.heads);
    const std::int64_t listed = std::int64_t{pass.batch} * pass.listed_tiles();
    pass.row_tiles = arena.take_array<RowTile>(of_keys ? 0 : listed);
    pass.key_tiles = arena.take_array<Tile>(of_keys ? listed : 0);
    pass.tasks_by_rows = arena.take_array<Task>(std::int64_t{pass.batch} * pass.row_tasks());
    pass.tasks_by_keys = arena.take_array<Task>(std::int64_t{pass.batch} * pass.key_tasks());
    pass.visits = arena.take_array<Visits>(2 * pass.batch);
    PassShape shape;
    shape.rows.tasks = pass.row_tasks();
    shape.keys.tasks = pass.key_tasks();
    shape.evaluated = true;
    shape.steps = {1};
    passes_.push_back({shape, pass.passes, pass.batch});
    global_passes_.push_back(pass);
  }

  void make_global_passes() const {
    for (const GlobalPass& pass : global_passes_) make_global_pass(pass, call_.stream);
  }

  // ---- rows and tables
  // --------------------------------------------------

  /// Of the output, and of its tangent where the call has one.
  void lay_out_deltas(Arena& arena) {
    arguments_.delta = arena.take(heads_ * p_.n_q * real_);
    if (p_.output_tangent.data) arguments_.delta_dot = arena.take(heads_ * p_.n_q * real_);
  }
  void queue_deltas() const {
    queue(kernels_.delta, blocks_for_rows(heads_ * p_.n_q));
    if (!p_.output_tangent.data) return;
    Arguments along = arguments_;
    along.call.output = p_.output_tangent;
    along.call.grad_lse = nullptr;
    along.delta = arguments_.delta_dot;
    kernels_.delta(blocks_for_rows(heads_ * p_.n_q), call_.stream, along);
  }

  std::vector<TableGradient> table_gradients() const {
    std::vector<TableGradient> wanted;
    if (p_.grad_bias.kind != TableKind::kNone) wanted.emplace_back(p_.grad_bias, false, p_);
    if (p_.grad_gate.kind != TableKind::kNone) wanted.emplace_back(p_.grad_gate, true, p_);
    return wanted;
  }

  /// A sweep for a table: of `blocks` for each that shares it, or of all together.
  void queue_table(const TableGradient& gradient, TableLaunch entries, TableLaunch sums,
                   std::int64_t tasks, std::int64_t blocks) const {
    if (!gradient.has_own_entries())
      return sums(gradient.sum_blocks(), call_.stream, {arguments_, gradient, 0, tasks});
    for (std::int64_t sharer = 0; sharer < gradient.sharers(); ++sharer)
      entries(blocks, call_.stream, {arguments_, gradient, sharer, tasks});
  }

  // ---- queueing
  // ----------------------------------------------------------------------------------

  States states(Arena& arena, std::int64_t rows) const {
    States made;
    made.output = arena.take(rows * p_.value_dim * real_);
    made.maximum = arena.take(rows * real_);
    made.sum = arena.take(rows * real_);
    return made;
  }

  std::int64_t most_slots(SweepShape PassShape::* side) const {
    std::int64_t most = 0;
    for (const PassAtHand& pass : passes_)
      most = std::max<std::int64_t>(most, (pass.shape.*side).slots);
    return most;
  }

  const Sweeps& sweeps_of(const PassAtHand& pass) const {
    if (p_.modifiers.any()) return kernels_.modified;
    return pass.shape.evaluated ? kernels_.evaluated : kernels_.planned;
  }
  const ListSweeps& list_sweeps() const {
    return p_.modifiers.any() ? kernels_.listed_modified : kernels_.listed;
  }
  void begin(const PassAtHand& pass) {
    std::fill(std::begin(arguments_.steps), std::end(arguments_.steps), 0);
    for (std::size_t i = 0; i < std::min<std::size_t>(pass.shape.steps.size(), kMostSteps); ++i)
      arguments_.steps[i] = pass.shape.steps[i];
    arguments_.passes = pass.table;
    arguments_.plan_batch = pass.plan_batch;
  }
  void begin(const DeviceLists& lists, const ListsView* views) {
    arguments_.lists = views;
    arguments_.plan_batch = lists.batch;
    arguments_.plan_heads = lists.heads;
  }
  void queue(Launch kernel, std::int64_t blocks) const { kernel(blocks, call_.stream, arguments_); }
  void set_add(bool add) {
    arguments_.grad_query.add = arguments_.grad_key.add = arguments_.grad_value.add = add;
  }

  void reduce(Launch kernel, const SweepShape& sweep, std::int64_t heads) {
    std::int32_t first = 0;
    for (const std::int32_t end : sweep.round_ends) {
      arguments_.first_reduction = first;
      arguments_.end_reduction = end;
      queue(kernel, (end - first) * heads);
      first = end;
    }
  }

  void sweep_rows(const PassAtHand& pass) {
    arguments_.slots_per_head = most_slots(&PassShape::rows);
    queue(sweeps_of(pass).grad_query, pass.shape.rows.tasks * heads_);
    reduce_added(kernels_.reduce_rows, pass.shape.rows, heads_);
  }
  void sweep_keys(const PassAtHand& pass) {
    arguments_.slots_per_head = most_slots(&PassShape::keys);
    const Sweeps& sweeps = sweeps_of(pass);
    for (const Launch kernel : {sweeps.grad_key_value, sweeps.grad_key, sweeps.grad_value}) {
      if (kernel) queue(kernel, pass.shape.keys.tasks * heads_kv_);
    }
    reduce_added(kernels_.reduce_keys, pass.shape.keys, heads_kv_);
  }
  /// Slots add to zeros, to a pass before this one, or to a round before.
  void reduce_added(Launch kernel, const SweepShape& sweep, std::int64_t heads) {
    const bool add = arguments_.grad_query.add;
    set_add(true);
    reduce(kernel, sweep, heads);
    set_add(add);
  }

  const Kernels& kernels_;
  const Call& call_;
  const AttentionParams& p_;
  const std::int64_t real_, heads_, heads_kv_;
  std::vector<PassAtHand> passes_;
  std::vector<GlobalPass> global_passes_;
  Arguments arguments_;
  double* partials_ = nullptr;
};

/// The first backward pass's, with sweeps along the tangent.
Kernels backward_kernels(const AlongKernels& along) {
  Kernels kernels = *along.portable;
  kernels.planned.grad_query = along.grad_query;
  kernels.planned.grad_key_value = along.grad_key_value;
  kernels.evaluated = kernels.modified = kernels.planned;
  kernels.listed.grad_query = along.listed_grad_query;
  kernels.listed.grad_key_value = along.listed_grad_key_value;
  kernels.listed_modified = kernels.listed;
  return kernels;
}

}  // namespace

std::int64_t forward_workspace(const Kernels& kernels, const Call& call) {
  return Sequence(kernels, call).lay_out_forward(nullptr);
}

std::int64_t backward_workspace(const Kernels& kernels, const Call& call) {
  return Sequence(kernels, call).lay_out_backward(nullptr);
}

bool adds_to_gradients(const Kernels& kernels, const Call& call) {
  const auto& passes = call.image->passes();
  const auto reduces = [](const PassShape& p) {
    return !p.rows.round_ends.empty() || !p.keys.round_ends.empty();
  };
  return Sequence(kernels, call).sweeps() > 1 || std::any_of(passes.begin(), passes.end(), reduces);
}

void forward(const Kernels& kernels, const Call& call) { Sequence(kernels, call).forward(); }

void backward(const Kernels& kernels, const Call& call, bool wide) {
  Sequence(kernels, call).backward(wide);
}

std::int64_t tangent_workspace(const AlongKernels& kernels, const Call& call) {
  return Sequence(*kernels.portable, call).lay_out_tangent(nullptr);
}

std::int64_t backward_along_workspace(const AlongKernels& kernels, const Call& call) {
  return backward_workspace(*kernels.portable, call);
}

std::int64_t grad_tables_workspace(const AlongKernels& kernels, const Call& call) {
  return Sequence(*kernels.portable, call).lay_out_tables(nullptr);
}

void tangent(const AlongKernels& kernels, const Call& call) {
  Sequence(*kernels.portable, call).tangent(kernels);
}

void backward_along(const AlongKernels& kernels, const Call& call, bool wide) {
  const Kernels of_call = backward_kernels(kernels);
  Sequence(of_call, call).backward(wide);
}

void grad_tables(const AlongKernels& kernels, const Call& call) {
  Sequence(*kernels.portable, call).grad_tables(kernels);
}

}  // namespace sparse_attn::cuda
