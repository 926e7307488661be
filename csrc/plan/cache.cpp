#include "plan/cache.h"

#include <utility>

#include "plan/lru_cache.h"

namespace sparse_attn {
namespace {

LruCache<Plan>& plans() {
  static LruCache<Plan> cache;
  return cache;
}

LruCache<Schedule>& schedules() {
  static LruCache<Schedule> cache;
  return cache;
}

Words schedule_key(const Expression& expression, Sizes sizes, Direction direction,
                   std::int64_t heads, int chunks) {
  Words key = encode(expression);
  key.insert(key.end(),
             {sizes.n_q, sizes.n_k, static_cast<std::int64_t>(direction), heads, chunks});
  return key;
}

}  // namespace

std::shared_ptr<const Plan> plan_of(const Expression& expression, Sizes sizes,
                                    const PatternTensor* tensors, Target target) {
  const auto make = [&] {
    return std::make_shared<const Plan>(
        choose_plan(expand(expression, sizes, tensors), sizes, target));
  };
  if (tensor_count(expression) > 0) return make();  // the tensors may hold other values next time
  Words key = encode(expression);
  key.insert(key.end(), {sizes.n_q, sizes.n_k, static_cast<std::int64_t>(target)});
  return plans().get(key, make);
}

std::shared_ptr<const Schedule> schedule_of(const Expression& expression, Sizes sizes,
                                            const PatternTensor* tensors, Direction direction,
                                            std::int64_t heads, int chunks) {
  const auto make = [&] {
    std::shared_ptr<const Plan> plan = plan_of(expression, sizes, tensors);
    const int cut = chunks > 0 ? chunks : chunk_count(*plan, heads);
    return std::make_shared<const Schedule>(std::move(plan), direction, cut);
  };
  if (tensor_count(expression) > 0) return make();
  return schedules().get(schedule_key(expression, sizes, direction, heads, chunks), make);
}

std::shared_ptr<const Schedule> kept_schedule(const Expression& expression, Sizes sizes,
                                              Direction direction, std::int64_t heads, int chunks) {
  if (tensor_count(expression) > 0) return nullptr;
  return schedules().find(schedule_key(expression, sizes, direction, heads, chunks));
}

void clear_plan_cache() {
  schedules().clear();
  plans().clear();
}

std::int64_t plan_cache_size() { return plans().size(); }

}  // namespace sparse_attn
