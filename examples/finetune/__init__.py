"""Parts of the fine-tuning example: a Hugging Face Longformer before and after the swap."""

import long_text  # noqa: F401  (sets how OpenMP waits, before torch is loaded)
