#include "ops/build_info.h"

#include <ATen/Parallel.h>
#include <torch/headeronly/version.h>

#include <sstream>

#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "ops/checks.h"

namespace sparse_attn {
BuildInfo build_info() {
  const auto isa_name = with_value_errors([] { return std::string(cpu::isa_name()); });
  BuildInfo info{SPARSE_ATTN_VERSION, TORCH_VERSION, {}, isa_name, {}, at::get_num_threads()};
  std::istringstream archs(cuda::built_for());
  for (std::string arch; archs >> arch;) info.cuda_archs.push_back(arch);
  for (int n = 0; const char* isa = cpu::compiled_isa(n); ++n) info.isas.emplace_back(isa);
  return info;
}

}  // namespace sparse_attn
