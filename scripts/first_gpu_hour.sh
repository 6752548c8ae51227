#!/usr/bin/env bash
# The first hour on a GPU, in the order of what must not be missed. Each step has its own time limit and leaves
# OUT/<step>.json and OUT/<step>.txt as it ends; OUT/summary.txt lists them, OUT/runs and OUT/report hold logs, results
# and report. Start it again to go on: finished steps are skipped, cut ones resume. Without a GPU it rehearses at smoke.
#
#   bash scripts/first_gpu_hour.sh OUT                       with the present python3, or PYTHON=...; installs nothing
#   MINUTES=25 bash scripts/first_gpu_hour.sh OUT            other than 60 minutes; 0 cuts every step at once
#   DATA=carried bash scripts/first_gpu_hour.sh OUT          tokens of scripts.tok_train --carry, or any folder of text
#
# Everything else (weights, checkpoints) goes to NANOCHAT_BASE_DIR, default OUT/base.
# Exit status: 0 all steps are done, 75 some were cut, 1 some failed. Neither stops the steps after it.
set -uo pipefail
out="${1:?give a folder for the results}"; mkdir -p "$out"; out="$(cd "$out" && pwd)"
data="${DATA:-}"; if [ -n "$data" ]; then data="$(cd "$data" && pwd)" || exit 2; fi
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}" minutes="${MINUTES:-60}"
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$out/base}"
find_preset='import torch; print("paper" if torch.cuda.is_available() else "smoke")'
preset="${PRESET:-}"; if [ -z "$preset" ]; then preset="$("$python" -c "$find_preset")" || exit 2; fi
downloaded="$HOME/.cache/nanochat/data/fineweb-edu"
if [ -z "$data" ] && [ "$preset" = paper ]; then
    if [ -d "$downloaded" ]; then data="$downloaded"; else data=embedded; fi
fi
flags=(--preset "$preset")
if [ -n "$data" ]; then flags+=(--data "$data"); fi
end=$(($(date +%s) + minutes * 57))   # 3 seconds of each minute are kept for the report
echo "preset $preset, data ${data:-of the preset}, $minutes minutes, results in $out"

step() {   # name, percent of the time that is left, command
    local name="$1" limit=$(((end - $(date +%s)) * $2 / 100)); shift 2
    if [ "$limit" -lt 1 ]; then limit=0.3; fi
    echo; echo "=== $name, at most $limit s"
    "$python" -m scripts.timed --seconds "$limit" --record "$out/$name" -- "$@"
    "$python" -m scripts.timed --summary "$out" > /dev/null
    (cd "$NANOCHAT_BASE_DIR" 2>/dev/null && find runs report -type f ! -path '*/checkpoints/*' \
        \( -name '*.json*' -o -name '*.txt' -o -name '*.md' -o -name '*.html' -o -name 'policy.*' \) 2>/dev/null \
        | tar cf - -T - | tar xf - -C "$out")
}
run() { local name="$1" share="$2"; shift 2; step "$name" "$share" "$python" -m "$@"; }
sweep() { local name="$1" share="$2"; shift 2; run "$name" "$share" scripts.sweep "${flags[@]}" --seeds 42 --what "$@"; }
planned() { sed -n "s/.* $1=\([0-9-]*\).*/\1/p" "$out/05_plan.txt" 2>/dev/null | tail -1; }

run 01_doctor 5 scripts.doctor --json "$out/doctor.json"
run 02_tokens 15 scripts.tok_train "${flags[@]}"
run 03_cuda_tests 15 pytest -m cuda tests -rs -p no:cacheprovider --continue-on-collection-errors
run 04_bench 22 scripts.bench --preset "$preset" --quick --first-look
run 05_plan 10 scripts.plan --preset "$preset" --minutes $(((end - $(date +%s)) / 60 + 1)) --seeds 42
updates="$(planned updates)" settings="$(planned settings)" constants="$(planned constants)" steps="$(planned steps)"
if [ "$steps" = -1 ]; then steps=""; fi   # the preset's

# One hand-tuned run with its curve: by name and flags the one that the comparison below takes.
run 06_hand_tuned 20 scripts.base_train "${flags[@]}" --seed 42 ${steps:+--num-iterations "$steps"} \
    --model-tag "$preset/hand_tuned-s42" --resume auto
run 07_meta_training 35 scripts.meta_train "${flags[@]}" --seed 42 --updates "${updates:-4}" \
    --model-tag "$preset/meta-s42" --resume auto
sweep 08_schedule_free 30 schedule-free --settings "${settings:-1}" ${steps:+--num-iterations "$steps"}
sweep 09_constants 35 best-constant --settings "${constants:-2}" ${steps:+--num-iterations "$steps"}
runs="$NANOCHAT_BASE_DIR/runs/$preset"
if [ -f "$runs/meta-s42/policy.safetensors" ] && [ -f "$runs/sweep_best_constant.json" ]; then
    sweep 10_methods 95 methods ${steps:+--num-iterations "$steps"}
else
    step 10_methods 95 bash -c 'echo "steps 07 to 09 must end first: start this again"; exit 75'
fi
end=$((end + minutes * 3))
run 11_report 100 scripts.report --preset "$preset"
"$python" -m scripts.timed --summary "$out"
