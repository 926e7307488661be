// What this build of sparse_attn has.
#pragma once

#include <string>
#include <vector>

namespace sparse_attn {

struct BuildInfo {
  std::string version;
  std::string torch;                    // the version it was compiled against
  std::vector<std::string> isas;        // compiled into it, best first, as in SPARSE_ATTN_ISA
  std::string isa;                      // in use
  std::vector<std::string> cuda_archs;  // of the CUDA kernels; none without
  int threads;                          // that an op may use
};

__attribute__((visibility("default"))) BuildInfo build_info();

}  // namespace sparse_attn
