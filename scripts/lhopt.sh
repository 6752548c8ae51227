#!/usr/bin/env bash
# LHOPT from nothing: bank, three policies, the shipped one, tables and figures. Stopped and started again, it goes on.
#   bash scripts/lhopt.sh                          three policies: about 45 minutes of one idle core
#   SEEDS=42 UPDATES=200 bash scripts/lhopt.sh     the run that the shipped policy comes from
# Results in $NANOCHAT_BASE_DIR/lhopt; nothing in the checkout is changed.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python}"
SEEDS="${SEEDS:-42 43 44}"
UPDATES="${UPDATES:-600}"
OUT="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/lhopt"
mkdir -p "$OUT"
export OMP_NUM_THREADS=1
policies=()
for seed in $SEEDS; do
  "$PYTHON" -m scripts.meta_train --recipe lhopt --seed "$seed" --updates "$UPDATES"
  policies+=("lhopt/tiny-s$seed")
done
"$PYTHON" -m scripts.lhopt.evaluate --policies "${policies[@]}" | tee "$OUT/held_out.txt"
"$PYTHON" -m scripts.lhopt.replay --policy "${policies[0]}" | tee "$OUT/replay.txt"
"$PYTHON" -m scripts.lhopt.ship --policies "${policies[@]}" --out "$OUT/shipped"
"$PYTHON" -m scripts.lhopt.figures --policies "${policies[@]}"
echo "done: $OUT"
