"""Parts of the image example: photographs pixel by pixel, with the Sparse Transformer."""

import long_text  # noqa: F401  (sets how OpenMP waits, before torch is loaded)
