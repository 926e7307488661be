#include "ops/device_plans.h"

#include <future>
#include <mutex>
#include <set>

#include "ops/checks.h"
#include "patterns/part.h"
#include "plan/head_plan.h"
#include "plan/lru_cache.h"

namespace sparse_attn {
namespace {

LruCache<DevicePlans>& cache() {
  static LruCache<DevicePlans> plans;
  return plans;
}

/// Graphs hold addresses of these plans: they are never freed.
void keep_for_graphs(const std::shared_ptr<const DevicePlans>& plans) {
  static std::mutex mutex;
  static std::set<std::shared_ptr<const DevicePlans>> kept;
  const std::lock_guard<std::mutex> lock(mutex);
  kept.insert(plans);
}

Words words_of(at::ArrayRef<Expression> patterns, const GridKey& key, at::Device device) {
  Words words{static_cast<std::int64_t>(device.type()),
              device.index(),
              key.sizes.n_q,
              key.sizes.n_k,
              key.grouping.rows,
              key.grouping.keys,
              key.heads,
              key.backward,
              key.global_tensor};
  for (const Expression& pattern : patterns) {
    const Words one = encode(pattern);
    words.insert(words.end(), one.begin(), one.end());
  }
  return words;
}

std::shared_ptr<const DevicePlans> make(at::ArrayRef<Expression> patterns, const GridKey& key,
                                        at::Device device) {
  std::vector<HeadPlan> heads;
  for (const Expression& pattern : patterns)
    heads.push_back(head_plan(pattern, key.sizes, key.global_tensor));
  const GridImage::Cut cut{key.grouping, key.heads, key.backward};
  if (patterns[0].word != Word::kPart)
    return std::make_shared<const DevicePlans>(GridImage(heads, cut), device);
  const Part part(patterns[0]);  // the same one of all heads
  const TokenNumbers numbers{tokens_at(part.queries, key.sizes.n_q),
                             tokens_at(part.keys, key.sizes.n_k)};
  return std::make_shared<const DevicePlans>(GridImage(heads, cut, &numbers), device);
}

}  // namespace

DevicePlans::DevicePlans(GridImage image, at::Device device) : image_(std::move(image)) {
  // In a thread of its own: what this one allocates may be meant for a pool (of a graph that is
  // being warmed up, say) that does not live as long as the plans.
  copy_ = std::async(std::launch::async, [&] {
            const auto options = at::TensorOptions().dtype(at::kByte);
            at::Tensor copy = at::empty({image_.size()}, options.device(device));
            std::vector<char> bytes = image_.at(copy.data_ptr());
            copy.copy_(at::from_blob(bytes.data(), {image_.size()}, options));  // waits for it
            return copy;
          }).get();
  image_.drop_bytes();
}

at::Tensor DevicePlans::tokens(std::int64_t offset, std::int64_t count) const {
  const std::int64_t bytes = count * static_cast<std::int64_t>(sizeof(std::int64_t));
  return copy_.narrow(0, offset, bytes).view(at::kLong);
}

void DevicePlans::used_on(c10::Stream stream) const {
  if (copy_.is_cuda()) copy_.record_stream(stream);
}

std::shared_ptr<const DevicePlans> device_plans(at::ArrayRef<Expression> patterns,
                                                const GridKey& key, at::Device device,
                                                bool capturing) {
  auto plans = cache().get(words_of(patterns, key, device), [&] {
    TORCH_CHECK(!capturing,
                "sparse_attn: expected one call with this pattern and these sizes before a graph "
                "is captured, so that its plan is on the device; got the first during the capture");
    return with_value_errors([&] { return make(patterns, key, device); });
  });
  if (capturing) keep_for_graphs(plans);
  return plans;
}

void clear_device_plans() { cache().clear(); }

}  // namespace sparse_attn
