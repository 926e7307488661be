// Runs a kernel, one block after the other in random order.
#pragma once

#include <cstdint>

#include "host/units.h"

namespace sparse_attn::cuda::emulator {

/// All of Kernel::run(arguments), for any type of arguments.
template <class Kernel, class Arguments>
void run(std::int64_t blocks, const Arguments& arguments) {
  static_assert(Kernel::kThreads % kWarp == 0 && Kernel::kThreads <= 1024);
  Random random(launch_seeds.word());
  const int count = static_cast<int>(blocks);
  for (const int number : shuffled(count, random)) {
    Block now(number, count, Kernel::kThreads, Kernel::kSharedBytes, random.word());
    now.body = [](const void* a) { Kernel::run(*static_cast<const Arguments*>(a)); };
    now.arguments = &arguments;
    now.argument_bytes = sizeof(arguments);
    block = &now;
    Units now_units(now);
    units = &now_units;
    executor.run();
    now_units.check_done();
    now.shared.check_red_zones();
    units = nullptr;
    block = nullptr;
  }
}

}  // namespace sparse_attn::cuda::emulator
