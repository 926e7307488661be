"""Parts of the genome example: a causal language model of DNA, dilated and global."""

import long_text  # noqa: F401  (sets how OpenMP waits, before torch is loaded)
