#!/usr/bin/env bash
# The paper from nothing to its tables and figures. Safe to start again: finished stages are skipped, others resume.
#
#   bash speedrun.sh                       paper size with a GPU, tiny (minutes, no download) without one
#   bash speedrun.sh --preset smoke        everything once, in about a minute
#   bash speedrun.sh --data my_texts       any folder of .parquet, .jsonl or .txt in place of the preset's data
#   bash speedrun.sh --seeds "1 2 3 4 5"   other seeds for Table 1
set -euo pipefail   # runs under bash 3.2 too: no array is ever empty, because expanding one would fail there
cd "$(dirname "$0")"

preset=auto data="" given_seeds=""
while [ $# -gt 0 ]; do
    case "$1" in
        --preset) preset="${2:?--preset needs a name}"; shift 2 ;;
        --data) data="${2:?--data needs a folder}"; shift 2 ;;
        --seeds) given_seeds="${2:?--seeds needs a list}"; shift 2 ;;
        -h|--help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "error: unknown flag $1; see bash speedrun.sh --help" >&2; exit 2 ;;
    esac
done

if [ -n "$data" ]; then   # other data, other tokenizer, other runs: a base directory of its own inside the base directory
    path="$(cd "$data" 2>/dev/null && pwd)" || { echo "error: --data $data is not a folder" >&2; exit 2; }
    export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/with-$(basename "$path")-$(cksum <<<"$path" | cut -d' ' -f1)"
fi

source scripts/setup.sh
chosen="$(python -m scripts.presets "$preset")"           # its name, the number of GPUs, its seeds
read -r preset gpus default_seeds <<<"$chosen"
read -ra seeds <<<"${given_seeds:-$default_seeds}"
flags=(--preset "$preset")
if [ -n "$data" ]; then flags+=(--data "$path"); fi
if [ "$gpus" -gt 1 ]; then launch=(torchrun --standalone --nproc_per_node "$gpus" -m); else launch=(python -m); fi

stages=9 stage=0 begin=$SECONDS
clock() { echo "$(((SECONDS - begin) / 60))m$(((SECONDS - begin) % 60))s"; }
say() { stage=$((stage + 1)); echo; echo "=== stage $stage of $stages: $1 ($(clock) so far)"; }
sweep() { python -m scripts.sweep "${flags[@]}" --seeds "${seeds[@]}" --what "$1"; }

say "data"
if [ -n "$data" ]; then python -m nanochat.dataset --from "$path"
elif [ "$preset" = paper ]; then python -m nanochat.dataset -n 12      # 294M tokens after packing, and the validation shard
else python -m nanochat.dataset; fi

say "tokenizer"
python -m scripts.tok_train "${flags[@]}"

say "schedule-free sweep (the paper's Table 3)"
sweep schedule-free

say "schedule-free with a fair share of tuning (8 more settings)"
sweep schedule-free-fair

if [ "$preset" = paper ]; then say "tuning of the upper bound: none, the hand-tuned defaults are the paper's"
else
    say "open tuning of the upper bound (8 settings)"
    sweep hand-tuned
fi

say "meta-training of the controller, once for each seed"
for seed in "${seeds[@]}"; do
    "${launch[@]}" scripts.meta_train "${flags[@]}" --seed "$seed" --model-tag "$preset/meta-s$seed" --resume auto
done

say "the best constant, by as many runs as meta-training costs"
sweep best-constant

say "the methods of Table 1"
sweep methods

say "report"
python -m scripts.report --preset "$preset"
echo "done in $(clock)"
