#!/usr/bin/env bash
# The paper from nothing to its tables and figures. Safe to start again: finished stages are skipped, others resume.
#
#   bash speedrun.sh                       paper size with a GPU, tiny (minutes, no download) without one
#   bash speedrun.sh --preset smoke        everything once, in about a minute
#   bash speedrun.sh --data my_texts       any folder of .parquet, .jsonl or .txt in place of the preset's data
#   bash speedrun.sh --seeds "1 2 3 4 5"   other seeds for Table 1
set -euo pipefail
cd "$(dirname "$0")"

preset=auto data=() seeds=()
while [ $# -gt 0 ]; do
    case "$1" in
        --preset) preset="${2:?--preset needs a name}"; shift 2 ;;
        --data) data=(--data "${2:?--data needs a folder}"); shift 2 ;;
        --seeds) read -ra seeds <<<"${2:?--seeds needs a list}"; seeds=(--seeds "${seeds[@]}"); shift 2 ;;
        -h|--help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "error: unknown flag $1; see bash speedrun.sh --help" >&2; exit 2 ;;
    esac
done

if [ ${#data[@]} -gt 0 ]; then   # other data, other tokenizer, other runs: a base directory of its own inside the base directory
    path="$(cd "${data[1]}" 2>/dev/null && pwd)" || { echo "error: --data ${data[1]} is not a folder" >&2; exit 2; }
    data=(--data "$path")
    export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/with-$(basename "$path")-$(cksum <<<"$path" | cut -d' ' -f1)"
fi

source scripts/setup.sh
read -r preset gpus < <(python -m scripts.presets "$preset")
if [ "$gpus" -gt 1 ]; then launch=(torchrun --standalone --nproc_per_node "$gpus" -m); else launch=(python -m); fi

stages=7 stage=0 begin=$SECONDS
say() { stage=$((stage + 1)); echo; echo "=== stage $stage of $stages: $1 ($(((SECONDS - begin) / 60))m$(((SECONDS - begin) % 60))s so far)"; }
preset_flag=(--preset "$preset")

say "data"
if [ ${#data[@]} -gt 0 ]; then python -m nanochat.dataset --from "${data[1]}"
elif [ "$preset" = paper ]; then python -m nanochat.dataset -n 12      # 294M tokens after packing, and the validation shard
else python -m nanochat.dataset; fi

say "tokenizer"
python -m scripts.tok_train "${preset_flag[@]}" "${data[@]}"

say "schedule-free sweep (the paper's Table 3)"
python -m scripts.sweep "${preset_flag[@]}" "${data[@]}" "${seeds[@]}" --what schedule-free

if [ "$preset" = paper ]; then say "tuning of the upper bound: none, the hand-tuned defaults are the paper's"
else
    say "open tuning of the upper bound (the same budget)"
    python -m scripts.sweep "${preset_flag[@]}" "${data[@]}" "${seeds[@]}" --what hand-tuned
fi

say "meta-training of the controller"
"${launch[@]}" scripts.meta_train "${preset_flag[@]}" "${data[@]}" --model-tag "$preset/meta" --resume auto

say "the four methods of Table 1"
python -m scripts.sweep "${preset_flag[@]}" "${data[@]}" "${seeds[@]}" --what methods

say "report"
python -m scripts.report "${preset_flag[@]}"
echo "done in $(((SECONDS - begin) / 60))m$(((SECONDS - begin) % 60))s"
