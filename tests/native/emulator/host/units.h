// What a block of sm_90 has beside its threads.
#pragma once

#include "host/mbarriers.h"
#include "host/named_barriers.h"
#include "host/warpgroups.h"

namespace sparse_attn::cuda::emulator {

struct Units {
  explicit Units(Block& of) : warpgroups(of.threads, of.random) {}

  /// At the end of the kernel.
  void check_done() const {
    barriers.check_done();
    warpgroups.check_done();
  }

  MBarriers barriers;
  NamedBarriers named_barriers;
  Warpgroups warpgroups;
};

/// Those of the block that runs.
inline Units* units = nullptr;

}  // namespace sparse_attn::cuda::emulator
