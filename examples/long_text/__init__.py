"""Parts of the long-text example: a byte-level causal language model with sparse attention."""

import os

# Threads that spin while they wait steal time from those they wait for as soon as other programs
# run: on two busy cores a training step took 3.3 s so, and 1.4 s with waits that sleep. OpenMP
# reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
