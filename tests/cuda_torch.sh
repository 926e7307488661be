#!/usr/bin/env bash
# Builds the whole extension, CUDA kernels and all, against the CUDA build of torch 2.11 in an environment of its own, and
# runs a few calls on the CPU with it. Needs nvcc and 10 GB; takes about 15 minutes on 2 cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
# torch looks for the toolkit beside the first nvcc on PATH, which may be a link.
CUDA_HOME=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$nvcc")")")}
export CUDA_HOME

environment=build/cuda_torch
[ -x $environment/bin/python ] || "${PYTHON:-python3}" -m venv $environment
$environment/bin/python -m pip install -q torch==2.11.0 numpy setuptools wheel ninja
root=$($environment/bin/python -c 'import torch; print(torch.__path__[0])')
PATH=$PWD/$environment/bin:$PATH
cmake -S . -B build/cuda_torch_build -G Ninja "-DSPARSE_ATTN_TORCH_ROOT=$root" -DSPARSE_ATTN_PYTHON=OFF \
  -DSPARSE_ATTN_CUDA=ON '-DCMAKE_CUDA_ARCHITECTURES=80-real;90a-real' -DSPARSE_ATTN_WERROR=ON >/dev/null
cmake --build build/cuda_torch_build --parallel
SPARSE_ATTN_LIBRARY=$PWD/build/cuda_torch_build/libsparse_attn.so python - <<'PYTHON'
import torch
import sparse_attn

assert torch.version.cuda, "expected a CUDA build of torch"
assert torch.ops.sparse_attn._cuda_archs() == ["80-real", "90a-real"]
query, key, value = (torch.randn(1, 2, 300, 32, requires_grad=True) for _ in range(3))
pattern = sparse_attn.Window(20)
output = sparse_attn.attention(query, key, value, pattern)
expected = torch.nn.functional.scaled_dot_product_attention(
    query, key, value, attn_mask=pattern.mask(300)
)
torch.testing.assert_close(output, expected)
output.sum().backward()
print("torch", torch.__version__, "with kernels for", *torch.ops.sparse_attn._cuda_archs())
PYTHON
