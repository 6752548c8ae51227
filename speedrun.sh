#!/usr/bin/env bash
# The paper from nothing to its tables and figures. Safe to start again: finished stages are skipped, others resume.
#
#   bash speedrun.sh                       paper size with a GPU, tiny (minutes, no download) without one
#   bash speedrun.sh --preset smoke        everything once, in about a minute
#   bash speedrun.sh --data my_texts       any folder of .parquet, .jsonl or .txt in place of the preset's data
#   bash speedrun.sh --seeds "1 2 3 4 5"   other seeds for Table 1
#   bash speedrun.sh --shards 2            download fewer FineWeb-Edu shards: several epochs over the same text
#   bash speedrun.sh --minutes 25          plan what fits, say it, do it; when time is up save and exit with status 75
#   bash speedrun.sh --no-setup            no .venv, no pip: the present python3 with what it has, or that of PYTHON=...
set -euo pipefail   # runs under bash 3.2 too: no array is ever empty, because expanding one would fail there
cd "$(dirname "$0")"

preset=auto data="" given_seeds="" minutes="" shards=12 setup=yes   # 12: 294M tokens after packing
while [ $# -gt 0 ]; do
    case "$1" in
        --preset) preset="${2:?--preset needs a name}"; shift 2 ;;
        --data) data="${2:?--data needs a folder}"; shift 2 ;;
        --seeds) given_seeds="${2:?--seeds needs a list}"; shift 2 ;;
        --minutes) minutes="${2:?--minutes needs a whole number}"; shift 2
            case "$minutes" in *[!0-9]*) echo "error: --minutes $minutes is not a whole number" >&2; exit 2 ;; esac ;;
        --shards) shards="${2:?--shards needs a number}"; shift 2 ;;
        --no-setup) setup=no; shift ;;
        -h|--help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "error: unknown flag $1; see bash speedrun.sh --help" >&2; exit 2 ;;
    esac
done

if [ -n "$data" ]; then   # other data, other tokenizer, other runs: a base directory of its own inside the base directory
    path="$(cd "$data" 2>/dev/null && pwd)" || { echo "error: --data $data is not a folder" >&2; exit 2; }
    export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}/with-$(basename "$path")-$(cksum <<<"$path" | cut -d' ' -f1)"
fi

if [ "$setup" = yes ] && [ -z "${PYTHON:-}" ]; then source scripts/setup.sh; python=python
else
    python="${PYTHON:-python3}"
    "$python" -c "import torch" 2>/dev/null \
        || { echo "error: $python has no torch; without PYTHON and --no-setup it is installed into .venv" >&2; exit 2; }
    "$python" -m scripts.doctor
fi
until=$(($(date +%s) + 60 * ${minutes:-0}))
if [ -n "$minutes" ]; then limit=("$python" -m scripts.timed --until "$until" --); else limit=(env); fi
trap '[ $? -ne 75 ] || echo "stopped; start again with the same flags to go on"' EXIT

chosen="$("$python" -m scripts.presets "$preset")"           # its name, the number of GPUs, its seeds
read -r preset gpus default_seeds <<<"$chosen"
read -ra seeds <<<"${given_seeds:-$default_seeds}"
flags=(--preset "$preset")
if [ -n "$data" ]; then flags+=(--data "$path"); fi
launch=("${limit[@]}" "$python" -m)
if [ "$gpus" -gt 1 ]; then launch+=(torch.distributed.run --standalone --nproc_per_node "$gpus" -m); fi
settings="" fair="" tuned="" constants="" updates="" steps=-1   # as a plan says; without one, the presets' own

stages=9 stage=0 begin=$SECONDS
clock() { echo "$(((SECONDS - begin) / 60))m$(((SECONDS - begin) % 60))s"; }
say() { stage=$((stage + 1)); echo; echo "=== stage $stage of $stages: $1 ($(clock) so far)"; }
sweep() {   # what to sweep, and how many settings ("": all; 0: the plan leaves it out)
    if [ "${2:-}" = 0 ]; then echo "left out by the plan"; return; fi
    "${limit[@]}" "$python" -m scripts.sweep "${flags[@]}" --seeds "${seeds[@]}" --what "$1" \
        --num-iterations "$steps" ${2:+--settings "$2"}
}

say "data"
if [ -n "$data" ]; then "${limit[@]}" "$python" -m nanochat.dataset --from "$path"
elif [ "$preset" = paper ]; then "${limit[@]}" "$python" -m nanochat.dataset -n "$shards"   # and the held-out one
else "${limit[@]}" "$python" -m nanochat.dataset; fi

say "tokenizer"
"${limit[@]}" "$python" -m scripts.tok_train "${flags[@]}"

if [ -n "$minutes" ]; then
    left="$("$python" -c "import time; print(max(0.1, ($until - time.time()) / 60))")"
    planned="$("$python" -m scripts.plan --preset "$preset" --minutes "$left" --seeds "${seeds[@]}")"
    eval "${planned##*$'\n'}"   # seeds=(...) settings=... and so on, the last line
fi

say "schedule-free sweep (the paper's Table 3)"
sweep schedule-free "$settings"

say "schedule-free with a fair share of tuning (8 more settings)"
sweep schedule-free-fair "$fair"

if [ "$preset" = paper ]; then say "tuning of the upper bound: none, the hand-tuned defaults are the paper's"
else
    say "open tuning of the upper bound (12 settings)"
    sweep hand-tuned "$tuned"
fi

say "meta-training of the controller, once for each seed"
for seed in "${seeds[@]}"; do
    "${launch[@]}" scripts.meta_train "${flags[@]}" --seed "$seed" --model-tag "$preset/meta-s$seed" \
        --resume auto ${updates:+--updates "$updates"}
done

say "the best constant, by as many runs as meta-training costs"
sweep best-constant "$constants"

say "the methods of Table 1"
sweep methods

say "report"
"$python" -m scripts.report --preset "$preset"
echo "done in $(clock)"
