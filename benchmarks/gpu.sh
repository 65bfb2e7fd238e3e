#!/usr/bin/env bash
# Everything that waits for a GPU, in pieces of at most ten minutes: `benchmarks/gpu.sh step`, `benchmarks/gpu.sh math`.
# They need torch, scikit-learn, safetensors and matplotlib; `math` needs pytest, too.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  step) for width in 16 64; do python3 -m benchmarks.step --device cuda --width "$width" --batch 128; done ;;
  math) python3 -m pytest -q -c /dev/null --rootdir . -p no:cacheprovider --noconftest tests/test_fisher.py tests/test_losses.py \
          tests/test_dampening.py tests/test_unlearn.py tests/test_pruning.py tests/test_model.py ;;
  *) echo "usage: $0 step|math" >&2; exit 2 ;;
esac
