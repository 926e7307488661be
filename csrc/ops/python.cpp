// The Python module _C: what torch.ops cannot say. Everything else goes through the ops, so that
// libsparse_attn serves every Python version and this module may be missing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops/build_info.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  const sparse_attn::BuildInfo info = sparse_attn::build_info();
  py::dict result;
  result["version"] = info.version;
  result["torch"] = info.torch;
  result["isas"] = info.isas;
  result["isa"] = info.isa;
  result["cuda_archs"] = info.cuda_archs;
  result["threads"] = info.threads;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What this build of sparse_attn has.";
  m.def("build_info", &build_info,
        "A dict: version, torch (compiled against), isas (compiled, best first), isa (in use), "
        "cuda_archs, threads.");
}
