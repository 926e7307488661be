"""What `import sparse_attn` costs besides torch."""

import subprocess
import sys

SCRIPT = """
import sys, torch
before = set(sys.modules)
import sparse_attn
slow = {"torch._dynamo", "sympy", "matplotlib", "transformers"}
print(sorted(slow & (set(sys.modules) - before)))
"""


def test_only_what_is_needed_is_loaded():
    """torch._dynamo with sympy takes as long as torch itself."""
    printed = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert printed.stdout.strip() == "[]", printed.stderr
