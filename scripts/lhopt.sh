#!/usr/bin/env bash
# LHOPT from nothing: bank, four policies, the shipped one, tables and figures. Stopped and started again, it goes on.
#   bash scripts/lhopt.sh                           four policies, what docs/lhopt.md reports: about 2 hours of one core
#   SEEDS=42 bash scripts/lhopt.sh                  one policy alone: about 1 hour
# TINY=1 also trains nanochat at `tiny` under the policies; the other lines of that table are there if speedrun.sh ran
# under the same base directory. Results in $NANOCHAT_BASE_DIR/lhopt; nothing in the checkout is changed.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python}"
SEEDS="${SEEDS:-42 43 44 45}"
ABLATE="${ABLATE:-1}"
TINY="${TINY:-1}"
OUT="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/lhopt"
mkdir -p "$OUT" && OUT="$(realpath "$OUT")"
export OMP_NUM_THREADS=1
policies=()
for seed in $SEEDS; do
  "$PYTHON" -m scripts.meta_train --recipe lhopt --seed "$seed"
  policies+=("lhopt/tiny-s$seed")
done
"$PYTHON" -m scripts.lhopt.ship --policies "${policies[@]}" --out "$OUT/shipped" | tee "$OUT/choice.txt"
"$PYTHON" -m scripts.lhopt.evaluate --policies "${policies[@]}" | tee "$OUT/held_out.txt"
"$PYTHON" -m scripts.lhopt.replay --policy "$OUT/shipped" | tee "$OUT/replay.txt"
"$PYTHON" -m scripts.lhopt.figures --policies "${policies[@]}" --control "$OUT/shipped"
if [ "$TINY" = 1 ]; then
  "$PYTHON" -m scripts.tok_train --preset tiny
  "$PYTHON" -m scripts.lhopt.pretrain --preset tiny --policies "${policies[@]}" | tee "$OUT/pretrain_tiny.txt"
fi
if [ "$ABLATE" = 1 ]; then
  "$PYTHON" -m scripts.lhopt.ablate | tee "$OUT/ablation.txt"
fi
echo "done: $OUT"
