// Runs a Longformer layer that AOTInductor compiled (examples/export_longformer.py), and compares
// with what it gave in Python. The library registers the ops that the package calls.
#include <ATen/ATen.h>
#include <sparse_attn/build_info.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <filesystem>
#include <string>

namespace {

constexpr std::int64_t kWidth = 64;

/// A (1, length, kWidth) tensor from a file of floats.
at::Tensor read(const std::filesystem::path& path) {
  const auto count = static_cast<std::int64_t>(std::filesystem::file_size(path) / sizeof(float));
  return at::from_file(path.string(), false, count, at::kFloat).view({1, -1, kWidth}).clone();
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: %s <folder that export_longformer.py wrote>\n", arguments[0]);
    return 2;
  }
  const std::filesystem::path folder = arguments[1];
  std::printf("sparse_attn %s\n", sparse_attn::build_info().version.c_str());
  torch::inductor::AOTIModelPackageLoader layer((folder / "longformer.pt2").string());
  const at::Tensor input = read(folder / "input.bin"), expected = read(folder / "output.bin");
  const at::Tensor output = layer.run({input}).at(0);
  const double error = (output - expected).abs().max().item<double>();
  std::printf("%ld tokens, largest difference from Python: %.1e\n",
              static_cast<long>(input.size(1)), error);
  return error < 1e-5 ? 0 : 1;
}
