#include "ops/build_info.h"

#include <ATen/Parallel.h>
#include <torch/headeronly/version.h>

#include <algorithm>

#include "cpu/kernels.h"

namespace sparse_attn {
namespace {

/// x86_64_v3 is a C++ identifier, x86-64-v3 the usual name.
std::string usual_name(std::string isa) {
  std::replace(isa.begin(), isa.end(), '_', '-');
  return isa;
}

}  // namespace

BuildInfo build_info() {
  BuildInfo info{SPARSE_ATTN_VERSION,  TORCH_VERSION, {}, usual_name(cpu::isa_name()), {},
                 at::get_num_threads()};
  for (int n = 0; const char* isa = cpu::compiled_isa(n); ++n) info.isas.push_back(usual_name(isa));
  return info;
}

}  // namespace sparse_attn
