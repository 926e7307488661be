#include "plan/image.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <numeric>
#include <type_traits>
#include <utility>

#include "plan/lists.h"

namespace sparse_attn {
namespace {

template <class T>
std::size_t index(T i) {
  return static_cast<std::size_t>(i);
}

/// Rows become columns, in halves, quarters and so on (Hacker's Delight, section 7-3).
Mask transposed(Mask m) {
  std::uint64_t low = 0x00000000ffffffff;
  for (std::size_t width = 32; width != 0; width /= 2, low ^= low << width) {
    for (std::size_t k = 0; k < kMaxTile; k = ((k | width) + 1) & ~width) {
      const std::uint64_t swapped = ((m[k] >> width) ^ m[k | width]) & low;
      m[k] ^= swapped << width;
      m[k | width] ^= swapped;
    }
  }
  return m;
}

std::vector<Mask> transposed(const std::vector<Mask>& masks) {
  std::vector<Mask> all;
  for (const Mask& mask : masks) all.push_back(transposed(mask));
  return all;
}

/// Fills each round up to as many reductions as it has in any plan, so that one pair of numbers
/// names it in all of them.
void align_rounds(std::vector<SweepArrays*> sweeps, SweepShape& shape) {
  std::vector<std::int32_t> most;
  for (const SweepArrays* sweep : sweeps) {
    most.resize(std::max(most.size(), sweep->round_ends.size()), 0);
    for (std::size_t r = 0; r < sweep->round_ends.size(); ++r)
      most[r] = std::max(most[r], sweep->round_ends[r] - (r == 0 ? 0 : sweep->round_ends[r - 1]));
    shape.tasks = std::max(shape.tasks, static_cast<std::int32_t>(sweep->tasks.size()));
    shape.slots = std::max(shape.slots, sweep->slots);
  }
  std::partial_sum(most.begin(), most.end(), std::back_inserter(shape.round_ends));
  for (SweepArrays* sweep : sweeps) {
    std::vector<Reduction> padded;
    std::size_t from = 0;
    for (std::size_t r = 0; r < sweep->round_ends.size(); ++r) {
      for (; from < index(sweep->round_ends[r]); ++from) padded.push_back(sweep->reductions[from]);
      padded.resize(index(shape.round_ends[r]), Reduction{-1, 0, 0});
    }
    sweep->reductions = std::move(padded);
  }
}

}  // namespace

/// Appends arrays to the image; pointers to them are offsets until `at` turns them into addresses.
struct GridImage::Layout {
  GridImage& image;

  template <class T>
  std::int64_t append(const T* data, std::size_t count) {
    static_assert(std::is_trivially_copyable_v<T>, "it is copied to the device byte by byte");
    constexpr std::size_t kAlignment = 16;
    image.bytes_.resize((image.bytes_.size() + kAlignment - 1) / kAlignment * kAlignment);
    const auto offset = static_cast<std::int64_t>(image.bytes_.size());
    const char* bytes = reinterpret_cast<const char*>(data);
    image.bytes_.insert(image.bytes_.end(), bytes, bytes + count * sizeof(T));
    return offset;
  }
  template <class T>
  const T* place(const std::vector<T>& v) {
    return reinterpret_cast<const T*>(append(v.data(), v.size()));
  }

  Sweep sweep(const SweepArrays& arrays) {
    return {place(arrays.tasks), place(arrays.visits), place(arrays.reductions),
            static_cast<std::int32_t>(arrays.tasks.size()),
            static_cast<std::int32_t>(arrays.reductions.size())};
  }

  /// What the passes of a plan have in common.
  void share(const Plan& plan) {
    const std::int64_t* tokens = place(plan.token_list);
    const Mask* masks = place(plan.masks);
    const Mask* of_rows = place(transposed(plan.masks));
    const auto words = [](const Mask* all) {
      return reinterpret_cast<const std::uint64_t(*)[kMaxTile]>(all);
    };
    image.shared_[&plan] = {tokens, words(masks), words(of_rows)};
  }

  const Instruction* program(const CompiledProgram& compiled) {
    if (compiled.instructions.empty()) return nullptr;
    Program program = compiled.instructions;
    std::vector<std::size_t> pointers;
    for (std::size_t i = 0; i < program.size(); ++i) {
      const std::size_t at = i * sizeof(Instruction);
      switch (program[i].kind) {
        case Instruction::Kind::kKeys:
          pointers.push_back(at + move(program[i], program[i].keys.tokens, program[i].keys.count));
          break;
        case Instruction::Kind::kQueries:
          pointers.push_back(at +
                             move(program[i], program[i].queries.tokens, program[i].queries.count));
          break;
        case Instruction::Kind::kRandomBlocks: {
          RandomBlocksRule& rule = program[i].random_blocks;
          pointers.push_back(at + move(program[i], rule.drawn, rule.rows * rule.count));
          break;
        }
        default:
          break;
      }
    }
    const std::int64_t offset = append(program.data(), program.size());
    for (const std::size_t p : pointers)
      image.pointers_.push_back(offset + static_cast<std::int64_t>(p));
    return reinterpret_cast<const Instruction*>(offset);
  }

  /// Places the tokens that an instruction points to; returns where in it the pointer is.
  std::size_t move(const Instruction& step, const std::int64_t*& tokens, std::int64_t count) {
    tokens = reinterpret_cast<const std::int64_t*>(append(tokens, index(count)));
    return static_cast<std::size_t>(reinterpret_cast<const char*>(&tokens) -
                                    reinterpret_cast<const char*>(&step));
  }

  std::int64_t table(const std::vector<GridPass>& passes) {
    const std::int64_t offset = append(passes.data(), passes.size());
    for (std::size_t i = 0; i < passes.size(); ++i) {
      const std::int64_t at = offset + static_cast<std::int64_t>(i * sizeof(GridPass));
      for (const std::size_t member :
           {offsetof(GridPass, row_tiles), offsetof(GridPass, key_tiles),
            offsetof(GridPass, token_list), offsetof(GridPass, masks),
            offsetof(GridPass, masks_of_rows), offsetof(GridPass, rows) + offsetof(Sweep, tasks),
            offsetof(GridPass, rows) + offsetof(Sweep, visits),
            offsetof(GridPass, rows) + offsetof(Sweep, reductions),
            offsetof(GridPass, keys) + offsetof(Sweep, tasks),
            offsetof(GridPass, keys) + offsetof(Sweep, visits),
            offsetof(GridPass, keys) + offsetof(Sweep, reductions)}) {
        image.pointers_.push_back(at + static_cast<std::int64_t>(member));
      }
      if (passes[i].program_size > 0)
        image.pointers_.push_back(at + static_cast<std::int64_t>(offsetof(GridPass, program)));
    }
    return offset;
  }

  std::int64_t lists(const std::vector<Lists>& all) {
    std::vector<ListsView> views;
    for (const Lists& one : all) {
      views.push_back(one.starts.empty() ? ListsView{}
                                         : ListsView{place(one.starts), place(one.keys)});
    }
    const std::int64_t offset = append(views.data(), views.size());
    for (std::size_t i = 0; i < views.size(); ++i) {
      if (all[i].starts.empty()) continue;  // null stays null
      const std::int64_t at = offset + static_cast<std::int64_t>(i * sizeof(ListsView));
      image.pointers_.push_back(at + static_cast<std::int64_t>(offsetof(ListsView, starts)));
      image.pointers_.push_back(at + static_cast<std::int64_t>(offsetof(ListsView, items)));
    }
    return offset;
  }
};

PassShape GridImage::add_pass(const std::vector<const Plan*>& plans,
                              const std::vector<const Pass*>& passes,
                              std::vector<PassArrays> arrays,
                              const std::vector<const CompiledProgram*>& programs) {
  Layout layout{*this};
  PassShape shape;
  std::vector<SweepArrays*> by_rows, by_keys;
  for (PassArrays& a : arrays) {
    by_rows.push_back(&a.rows);
    by_keys.push_back(&a.keys);
  }
  align_rounds(by_rows, shape.rows);
  align_rounds(by_keys, shape.keys);
  std::vector<GridPass> table;
  for (std::size_t i = 0; i < passes.size(); ++i) {
    const Shared& shared = shared_.at(plans[i]);
    table.push_back({layout.place(passes[i]->row_tiles), layout.place(passes[i]->key_tiles),
                     shared.tokens, shared.masks, shared.masks_of_rows,
                     layout.sweep(arrays[i].rows), layout.sweep(arrays[i].keys),
                     layout.program(*programs[i]),
                     static_cast<std::int32_t>(programs[i]->instructions.size())});
  }
  for (const Pass* pass : passes) {
    const auto step = static_cast<std::int32_t>(pass->step);
    if (std::find(shape.steps.begin(), shape.steps.end(), step) == shape.steps.end())
      shape.steps.push_back(step);
  }
  shape.table = layout.table(table);
  return shape;
}

/// The passes of the plans, number p of all heads together.
void GridImage::add_planned(const std::vector<HeadPlan>& heads, const Cut& cut) {
  static const Pass kNoPass;
  static const CompiledProgram kNoProgram;
  std::size_t passes = 0;
  for (const HeadPlan& head : heads) passes = std::max(passes, head.plan->passes.size());
  for (std::size_t p = 0; p < passes; ++p) {
    std::vector<const Plan*> plans;
    std::vector<const Pass*> of_heads;
    std::vector<PassArrays> arrays;
    for (const HeadPlan& head : heads) {
      plans.push_back(head.plan.get());
      of_heads.push_back(p < head.plan->passes.size() ? &head.plan->passes[p] : &kNoPass);
      arrays.push_back(
          sweeps_of(*head.plan, *of_heads.back(), cut.grouping, cut.heads, cut.backward));
    }
    passes_.push_back(add_pass(plans, of_heads, std::move(arrays),
                               std::vector<const CompiledProgram*>(heads.size(), &kNoProgram)));
  }
}

namespace {

void leave_to_programs(SweepArrays& sweep) {
  for (Visits& visits : sweep.visits) {
    for (std::int32_t& mask : visits.masks) mask = mask == kSkip ? kSkip : kEvaluate;
  }
}

}  // namespace

PassShape GridImage::add_evaluated(const std::vector<HeadPlan>& heads,
                                   CompiledProgram HeadPlan::* program, const PassArrays& cut) {
  std::vector<PassArrays> arrays;
  std::vector<const CompiledProgram*> programs;
  for (const HeadPlan& head : heads) {
    programs.push_back(&(head.*program));
    arrays.push_back(programs.back()->instructions.empty() ? PassArrays{} : cut);
    leave_to_programs(arrays.back().rows);
    leave_to_programs(arrays.back().keys);
  }
  PassShape shape = add_pass(std::vector<const Plan*>(heads.size(), natural_.get()),
                             std::vector<const Pass*>(heads.size(), &natural_->passes[0]),
                             std::move(arrays), programs);
  shape.evaluated = true;
  return shape;
}

GridImage::GridImage(const std::vector<HeadPlan>& heads, const Cut& cut, const TokenNumbers* part) {
  const Sizes sizes = heads[0].plan->sizes;
  natural_ = std::make_shared<const Plan>(build_plan({Term{}}, sizes));
  Layout layout{*this};
  for (const HeadPlan& head : heads) layout.share(*head.plan);
  layout.share(*natural_);
  add_planned(heads, cut);
  const auto any = [&](CompiledProgram HeadPlan::* program) {
    return std::any_of(heads.begin(), heads.end(),
                       [&](const HeadPlan& h) { return !(h.*program).instructions.empty(); });
  };
  if (any(&HeadPlan::looked_up)) {
    const PassArrays all =
        sweeps_of(*natural_, natural_->passes[0], cut.grouping, cut.heads, cut.backward);
    passes_.push_back(add_evaluated(heads, &HeadPlan::looked_up, all));
  }
  if (any(&HeadPlan::global_keys)) {  // the device makes the tasks
    global_keys_ = add_evaluated(heads, &HeadPlan::global_keys, {}).table;
    global_queries_ = add_evaluated(heads, &HeadPlan::global_queries, {}).table;
  }
  add_listed(heads);
  if (std::any_of(heads.begin(), heads.end(),
                  [](const HeadPlan& h) { return !h.plan->lists->keys.empty(); }))
    add_lists(heads, cut.backward);
  if (part) {
    query_tokens_ = layout.append(part->queries.data(), part->queries.size());
    key_tokens_ = layout.append(part->keys.data(), part->keys.size());
  }
  natural_.reset();
  shared_.clear();
  size_ = static_cast<std::int64_t>(bytes_.size());
}

/// A table of programs for each part with lists of keys.
void GridImage::add_listed(const std::vector<HeadPlan>& heads) {
  Layout layout{*this};
  std::size_t parts = 0;
  for (const HeadPlan& head : heads) parts = std::max(parts, head.listed.size());
  for (std::size_t p = 0; p < parts; ++p) {
    std::vector<GridPass> table;
    for (const HeadPlan& head : heads) {
      GridPass pass{};
      if (p < head.listed.size()) {
        pass.program = layout.program(head.listed[p]);
        pass.program_size = static_cast<std::int32_t>(head.listed[p].instructions.size());
      }
      table.push_back(pass);
    }
    listed_.push_back(layout.table(table));
  }
}

void GridImage::add_lists(const std::vector<HeadPlan>& heads, bool backward) {
  Layout layout{*this};
  std::vector<Lists> by_query, by_key;
  for (const HeadPlan& head : heads) {
    const Plan& plan = *head.plan;
    by_query.push_back(plan.lists->keys.empty() ? Lists{} : *plan.lists);
    by_key.push_back(backward && !plan.lists->keys.empty() ? transposed(*plan.lists, plan.sizes.n_k)
                                                           : Lists{});
  }
  keys_of_query_ = layout.lists(by_query);
  if (backward) queries_of_key_ = layout.lists(by_key);
}

void GridImage::drop_bytes() {
  bytes_ = {};
  pointers_ = {};
}

std::vector<char> GridImage::at(const void* base) const {
  std::vector<char> bytes = bytes_;
  for (const std::int64_t offset : pointers_) {
    std::uintptr_t address;
    std::memcpy(&address, bytes.data() + offset, sizeof(address));
    address += reinterpret_cast<std::uintptr_t>(base);
    std::memcpy(bytes.data() + offset, &address, sizeof(address));
  }
  return bytes;
}

}  // namespace sparse_attn
