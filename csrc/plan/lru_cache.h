// A bounded, thread-safe cache of values that are made once, least recently used first out.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "patterns/expression.h"
#include "plan/plan.h"

namespace sparse_attn {

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
    if (std::shared_ptr<const Value> kept = find(key)) return kept;
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

  /// Null if there is none.
  std::shared_ptr<const Value> find(const Words& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = index_.find(key);
    if (found == index_.end()) return nullptr;
    order_.splice(order_.begin(), order_, found->second);
    return found->second->second;
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

}  // namespace sparse_attn
