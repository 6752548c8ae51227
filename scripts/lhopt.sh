#!/usr/bin/env bash
# LHOPT from nothing: bank, three policies, the shipped one, tables and figures. Stopped and started again, it goes on.
#   bash scripts/lhopt.sh             about an hour of one core; results in $NANOCHAT_BASE_DIR/lhopt
#   SEEDS="42" bash scripts/lhopt.sh  one policy
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python}"
SEEDS="${SEEDS:-42 43 44}"
OUT="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/lhopt"
mkdir -p "$OUT"
export OMP_NUM_THREADS=1
policies=()
for seed in $SEEDS; do
  "$PYTHON" -m scripts.meta_train --recipe lhopt --seed "$seed"
  policies+=("lhopt/tiny-s$seed")
done
"$PYTHON" -m scripts.lhopt.evaluate --policies "${policies[@]}" | tee "$OUT/held_out.txt"
"$PYTHON" -m scripts.lhopt.replay --policy "${policies[0]}" | tee "$OUT/replay.txt"
"$PYTHON" -m scripts.lhopt.ship --policies "${policies[@]}" --out "$OUT/shipped"
"$PYTHON" -m scripts.lhopt.figures --policies "${policies[@]}"
echo "done: $OUT"
