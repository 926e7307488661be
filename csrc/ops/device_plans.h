// Plans on a device: built on the host, copied once, kept.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Stream.h>

#include <memory>
#include <vector>

#include "patterns/expression.h"
#include "plan/image.h"

namespace sparse_attn {

/// What decides about a call's plans, besides the pattern.
struct GridKey {
  Sizes sizes;
  Grouping grouping;
  std::int64_t heads;  // batch times heads
  bool backward;
  std::int32_t global_tensor = -1;  // of the call; -1 without per-example global tokens
};

/// An image and its copy on a device.
class DevicePlans {
 public:
  DevicePlans(GridImage image, at::Device device);

  const GridImage& image() const { return image_; }
  const char* base() const { return static_cast<const char*>(copy_.const_data_ptr()); }
  /// Numbers of the image, on the device.
  at::Tensor tokens(std::int64_t offset, std::int64_t count) const;
  /// Of the image, which lives on the device alone; for the cache.
  std::int64_t bytes() const { return image_.size(); }
  /// The memory is not to be used again before the work queued on the stream is done.
  void used_on(c10::Stream stream) const;

 private:
  GridImage image_;
  at::Tensor copy_;
};

/// The plans of a list of patterns, one for each group of heads. `capturing` says that the calls
/// are being recorded in a graph: then the copy must be there, and stays for good.
std::shared_ptr<const DevicePlans> device_plans(at::ArrayRef<Expression> patterns,
                                                const GridKey& key, at::Device device,
                                                bool capturing);

void clear_device_plans();

}  // namespace sparse_attn
