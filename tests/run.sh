#!/usr/bin/env bash
# Sets up, builds, and runs every check: native tests, CUDA kernels on the emulator and through nvcc, formatting, the C++
# example, pytest.
# usage: bash tests/run.sh [pytest options]      SPARSE_ATTN_FULL=1 runs all cases instead of a sample
#        SPARSE_ATTN_CUDA_TORCH=1 also builds everything against the CUDA build of torch 2.11 (downloads 5 GB)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/environment.sh"
cd "$root"
if [ -n "${CI:-}" ]; then # elsewhere a newer compiler's new warning must not stop a build
  export SPARSE_ATTN_CMAKE_ARGS="-DSPARSE_ATTN_WERROR=ON ${SPARSE_ATTN_CMAKE_ARGS:-}"
fi
prepare examples test
PATH=$(dirname "$python"):$PATH
jobs=$("$python" -c 'import setup; print(setup.parallel_jobs())')

say "Compile times"
"$python" scripts/compile_times.py build --budget 90

say "Objects of the instruction sets"
"$python" scripts/check_isa_objects.py build

# Head sizes of the tensor-core kernels on the emulator: 128 columns have the tiles of 64 (the Python tests on the emulator run that
# instance), 256 have others. Compilers run for minutes here, so commits take turns: with the instruction set under the sanitizers (the
# Python tests run all), and with the CUDA kernels under ThreadSanitizer or through nvcc, its head sizes and architecture, or the
# NEON kernels under qemu.
turn=$((0x$(git rev-parse --short=7 HEAD 2>/dev/null || echo 0)))
if [ "${SPARSE_ATTN_FULL:-}" = 1 ]; then
  sizes='32;64;96;128;192;256' nvcc_sizes=$sizes isa='x86_64_amx;x86_64_v4;x86_64_v3;x86_64_v2' architectures='80-real;90a-real'
  slow_checks='races nvcc aarch64'
else
  sizes='128;256'
  choices=('64;256' '128') && nvcc_sizes=${choices[turn % 2]}
  choices=(80-real 90a-real) && architectures=${choices[turn / 2 % 2]}
  choices=(x86_64_v2 'x86_64_amx;x86_64_v4') && isa=${choices[turn / 4 % 2]}
  grep -qs avx512f /proc/cpuinfo || isa=x86_64_v2
  choices=(races nvcc aarch64) && slow_checks=${choices[turn / 8 % 3]}
fi

# Where only the CUDA kernels count, one instruction set of the CPU will do.
isas=() sanitized_isas=()
if [ "$(uname -m)" = x86_64 ]; then
  isas=(-DSPARSE_ATTN_ISAS=x86_64_v2)
  sanitized_isas=("-DSPARSE_ATTN_ISAS=$isa")
fi

say "Native tests, with sanitizers (${sanitized_isas[*]}, heads of $sizes)"
cmake -S . -B build/native -G Ninja -DSPARSE_ATTN_TORCH=OFF -DSPARSE_ATTN_NATIVE_TESTS=ON \
  -DSPARSE_ATTN_SANITIZE=ON -DSPARSE_ATTN_WERROR=ON "-DSPARSE_ATTN_HEAD_SIZES=$sizes" "${sanitized_isas[@]}" >/dev/null
cmake --build build/native --parallel "$jobs"
ctest --test-dir build/native --output-on-failure --no-tests=error --parallel "$jobs"

if [[ $slow_checks = *races* ]]; then
  say "Data races of the CUDA kernels, with ThreadSanitizer"
  cmake -S . -B build/races -G Ninja -DSPARSE_ATTN_TORCH=OFF -DSPARSE_ATTN_NATIVE_TESTS=ON \
    -DSPARSE_ATTN_SANITIZE=THREADS -DSPARSE_ATTN_WERROR=ON '-DSPARSE_ATTN_HEAD_SIZES=32;64' \
    -DSPARSE_ATTN_TENSOR_CORE_SCALARS=bfloat16 "${isas[@]}" >/dev/null
  cmake --build build/races --parallel "$jobs"
  ctest --test-dir build/races --output-on-failure --no-tests=error
fi

if [[ $slow_checks = *nvcc* ]] && command -v nvcc >/dev/null; then
  say "CUDA kernels, with nvcc ($architectures, heads of $nvcc_sizes)"
  cmake -S . -B build/cuda -G Ninja -DSPARSE_ATTN_TORCH=OFF -DSPARSE_ATTN_CUDA=ON -DSPARSE_ATTN_WERROR=ON \
    "-DCMAKE_CUDA_ARCHITECTURES=$architectures" -DCMAKE_CUDA_FLAGS=-Xptxas=-v \
    "-DSPARSE_ATTN_HEAD_SIZES=$nvcc_sizes" "${isas[@]}" >/dev/null
  # From the start: what a build prints of registers is not kept.
  cmake --build build/cuda --parallel "$jobs" --clean-first --target sparse_attn_cuda >build/cuda.log 2>&1 ||
    { tail -n 50 build/cuda.log && exit 1; }
  "$python" scripts/check_registers.py build/cuda.log --library build/cuda/libsparse_attn_cuda.a
fi

if [[ $slow_checks = *aarch64* ]]; then
  say "NEON kernels, under qemu"
  if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
    cmake -S . -B build/aarch64 -G Ninja -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake -DSPARSE_ATTN_TORCH=OFF \
      -DSPARSE_ATTN_NATIVE_TESTS=ON -DSPARSE_ATTN_WERROR=ON >/dev/null
    cmake --build build/aarch64 --parallel "$jobs" --target test_cpu test_simd test_plan test_patterns
    ctest --test-dir build/aarch64 --output-on-failure --no-tests=error --parallel "$jobs" \
      --tests-regex '^test_(cpu|simd|plan|patterns)$'
  else
    echo "left out: there is no aarch64-linux-gnu-g++ or no qemu-aarch64 (Debian: g++-aarch64-linux-gnu qemu-user)"
  fi
fi

if [ "${SPARSE_ATTN_CUDA_TORCH:-}" = 1 ]; then
  say "Everything against a CUDA build of torch"
  bash tests/cuda_torch.sh
fi

say "Formatting and lint"
ruff check .
ruff format --check .
find csrc tests/native examples/cpp -regex '.*\.\(h\|cpp\|cuh\|cu\)' -print0 |
  xargs -0 clang-format --dry-run -Werror

say "C++ example"
prefixes='import sparse_attn as a, torch.utils as t; print(a.cmake_prefix_path, t.cmake_prefix_path, sep=";")'
cmake -S examples/cpp -B build/cpp_example -G Ninja -DCMAKE_PREFIX_PATH="$("$python" -c "$prefixes")" \
  >/dev/null
cmake --build build/cpp_example --parallel "$jobs"
build/cpp_example/attention

say "A compiled layer in C++"
"$python" examples/export_longformer.py --out build/exported
build/cpp_example/exported build/exported

say "Python tests through the CUDA kernels, on the emulator"
cmake -S . -B build/emulated -G Ninja -DSPARSE_ATTN_EMULATE_CUDA=ON -DSPARSE_ATTN_PYTHON=OFF -DSPARSE_ATTN_WERROR=ON \
  "-DSPARSE_ATTN_TORCH_ROOT=$("$python" -c 'import torch; print(torch.__path__[0])')" -DSPARSE_ATTN_HEAD_SIZES='32;64' \
  "${isas[@]}" >/dev/null
cmake --build build/emulated --parallel "$jobs"
some='test_cuda or tensor_patterns or index_attention or head_dims or global_mask or gqa or ends_are_aligned'
some+=' or test_lists or keys_in_order or test_error or test_segments or test_strides or test_options and -3]'
[ "${SPARSE_ATTN_FULL:-}" = 1 ] && some=
SPARSE_ATTN_LIBRARY=$PWD/build/emulated/libsparse_attn.so "$python" -m pytest -q -n "$jobs" -k "$some" tests/test_cuda.py \
  tests/test_tensor_patterns.py tests/test_index_attention.py tests/test_attention.py tests/test_causal_products.py \
  tests/test_selection.py tests/test_shared_keys.py tests/test_context_parallel.py

say "Hugging Face's models of transformers 4"
older=build/transformers4
[ -d "$older/transformers" ] ||
  "$python" -m pip install --quiet --no-deps --target "$older" -r requirements/transformers4.txt
PYTHONPATH=$older "$python" -m pytest -q -n "$jobs" tests/test_huggingface_*.py

say "Python tests"
exec "$python" -m pytest -n "$jobs" "$@"
