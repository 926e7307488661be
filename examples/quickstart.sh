#!/usr/bin/env bash
# Sets up, builds, and trains a small Longformer language model on real text.
# usage: bash examples/quickstart.sh [options of examples/train_long_text.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/environment.sh"
prepare examples
say "Training"
exec "$python" "$root/examples/train_long_text.py" "$@"
