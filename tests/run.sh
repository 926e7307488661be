#!/usr/bin/env bash
# Sets up, builds, and runs every check: native tests, formatting, the C++ example, pytest.
# usage: bash tests/run.sh [pytest options]      SPARSE_ATTN_FULL=1 runs all cases instead of a sample
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

say "Native tests, with sanitizers"
cmake -S . -B build/native -G Ninja -DSPARSE_ATTN_TORCH=OFF -DSPARSE_ATTN_NATIVE_TESTS=ON \
  -DSPARSE_ATTN_SANITIZE=ON -DSPARSE_ATTN_WERROR=ON >/dev/null
cmake --build build/native --parallel "$jobs"
ctest --test-dir build/native --output-on-failure --no-tests=error

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

say "Python tests"
exec "$python" -m pytest "$@"
