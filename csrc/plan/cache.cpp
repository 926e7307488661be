#include "plan/cache.h"

#include <list>
#include <map>
#include <mutex>
#include <utility>

namespace sparse_attn {
namespace {

/// A model needs a few plans for each pattern and length; per-example global tokens need one for
/// each set of tokens. A window plan of 4096 tokens has 10 KiB, one of a million 3 MiB.
constexpr std::size_t kMostEntries = 512;
constexpr std::int64_t kMostBytes = std::int64_t{128} << 20;

template <class Value>
class LruCache {
 public:
  /// `make` runs outside the lock: a long build does not hold up other threads, and two that build
  /// the same value agree on it.
  template <class Make>
  std::shared_ptr<const Value> get(const Words& key, Make make) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (const auto found = index_.find(key); found != index_.end()) {
        order_.splice(order_.begin(), order_, found->second);
        return found->second->second;
      }
    }
    std::shared_ptr<const Value> made = make();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto found = index_.find(key); found != index_.end()) return found->second->second;
    order_.emplace_front(key, made);
    index_[key] = order_.begin();
    bytes_ += bytes(order_.front());
    while (order_.size() > kMostEntries || (bytes_ > kMostBytes && order_.size() > 1))
      drop_oldest();
    return made;
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    index_.clear();
    order_.clear();
    bytes_ = 0;
  }

  std::int64_t size() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<std::int64_t>(order_.size());
  }

 private:
  using Entries = std::list<std::pair<Words, std::shared_ptr<const Value>>>;

  /// A key, which lists all global tokens, is held twice.
  static std::int64_t bytes(const typename Entries::value_type& entry) {
    return 2 * bytes_of(entry.first) + entry.second->bytes();
  }

  void drop_oldest() {
    bytes_ -= bytes(order_.back());
    index_.erase(order_.back().first);
    order_.pop_back();
  }

  std::mutex mutex_;
  Entries order_;
  std::int64_t bytes_ = 0;
  std::map<Words, typename Entries::iterator> index_;
};

LruCache<Plan>& plans() {
  static LruCache<Plan> cache;
  return cache;
}

LruCache<Schedule>& schedules() {
  static LruCache<Schedule> cache;
  return cache;
}

}  // namespace

std::shared_ptr<const Plan> plan_of(const Expression& expression, Sizes sizes,
                                    const PatternTensor* tensors) {
  const auto make = [&] {
    return std::make_shared<const Plan>(choose_plan(expand(expression, sizes, tensors), sizes));
  };
  if (tensor_count(expression) > 0) return make();  // the tensors may hold other values next time
  Words key = encode(expression);
  key.insert(key.end(), {sizes.n_q, sizes.n_k});
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
  Words key = encode(expression);
  key.insert(key.end(),
             {sizes.n_q, sizes.n_k, static_cast<std::int64_t>(direction), heads, chunks});
  return schedules().get(key, make);
}

void clear_plan_cache() {
  schedules().clear();
  plans().clear();
}

std::int64_t plan_cache_size() { return plans().size(); }

}  // namespace sparse_attn
