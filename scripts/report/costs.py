"""What everything cost, in one accounting for every method.

The unit is one run of a sweep's setting: forward and backward FLOPs of the training steps and one validation at the
end. Prices are multiples of its FLOPs ("run equivalents") and core-seconds: seconds times threads and ranks on a CPU,
times GPUs on CUDA. Probe, validation and test passes count wherever they are made.
"""

from __future__ import annotations

from dataclasses import dataclass

from scripts.presets import PRESETS
from scripts.report.evidence import Evidence
from scripts.report.statistics import mean, ratio, total
from scripts.sweep.settings import SWEEPS, run_price

# Runs spent on a method at tiny before its sweep or its recipe was written down. The 37 are listed in
# scripts/sweep/settings.py. JEL's are an estimate: the meta-trainings and deployed runs listed in docs/history.md,
# 160 and 30 for the paper's recipe, 255, 455 and 390 for the first three of our own, 560 for weight decay, and 170 for
# episodes with half the batch.
EXPLORATORY_RUNS = {"hand_tuned": 37, "jel": 2000}


def tokens_of(preset: str) -> int:
    """Of one training run."""
    run = PRESETS[preset]["base_train"]
    return run["num_iterations"] * run["total_batch_size"]


@dataclass(frozen=True)
class Price:
    """Run equivalents by FLOPs, and core-seconds; None where not measured."""

    runs: float | None
    core_seconds: float | None


def unit(evidence: Evidence, key: str = "flops") -> float | None:
    """FLOPs (or core-seconds, or tokens) of one run: the median setting of Table 3's sweep, else the mean JEL run."""
    return run_price(evidence.sweeps.get("schedule-free", {"rows": []})["rows"], key) or mean(
        list(evidence.results("jel", key).values())
    )


def in_runs(evidence: Evidence, flops: float | None) -> float | None:
    return ratio(flops, unit(evidence))


def run_cost(evidence: Evidence, method: str) -> Price:
    """A run of the method, mean over its seeds: its validation curve and the test split included."""
    flops, seconds = (mean(list(evidence.results(method, key).values())) for key in ("flops", "core_seconds"))
    return Price(in_runs(evidence, flops), seconds)


def sweep_cost(evidence: Evidence, what: str) -> Price:
    """All settings of a sweep."""
    return rows_cost(evidence, evidence.sweeps[what]["rows"] if what in evidence.sweeps else [])


def rows_cost(evidence: Evidence, rows: list[dict]) -> Price:
    """All these settings. One that diverged counts by the tokens that it came to."""
    per_token = ratio(unit(evidence), unit(evidence, "tokens"))
    flops = [
        row["flops"] if row["flops"] is not None else None if per_token is None else row["tokens"] * per_token
        for row in rows
    ]
    return Price(in_runs(evidence, total(flops)), total([row.get("core_seconds") for row in rows]))


def meta_cost(evidence: Evidence) -> Price:
    """Meta-training of one policy, mean over the seeds whose meta-training has finished."""
    results = [meta.result for meta in evidence.meta.values() if meta.result]
    flops, seconds = (mean([result[key] for result in results]) for key in ("flops", "core_seconds"))
    return Price(in_runs(evidence, flops), seconds)


def tuning_parts(evidence: Evidence, method: str) -> list[tuple[str, Price]]:
    """What found the method's settings, part by part, except `EXPLORATORY_RUNS`."""
    parts = [
        (f"sweep {what}", sweep_cost(evidence, what)) for what in SWEEPS.get(method, ()) if what in evidence.sweeps
    ]
    if method == "jel":
        parts.append(("meta-training", meta_cost(evidence)))
    return parts


def exploratory_runs(evidence: Evidence, method: str) -> int:
    """In runs of the preset; 0 at the paper's size, where nobody knows what its authors spent, and at smoke."""
    if evidence.preset not in ("tiny", "small"):
        return 0
    return round(EXPLORATORY_RUNS.get(method, 0) * tokens_of("tiny") / tokens_of(evidence.preset))


def tuning_cost(evidence: Evidence, method: str) -> float | None:
    """Everything that found the method's settings, in run equivalents; None where a part was not measured."""
    if method == "suboptimal":
        return 0.0
    found = total([price.runs for _, price in tuning_parts(evidence, method)])
    return None if found is None else found + exploratory_runs(evidence, method)


def controller_cost(evidence: Evidence) -> dict[str, float | None]:
    """Milliseconds a decision, and percent of the run's time, over all JEL runs; None where not measured."""
    results = [run.result for run in evidence.runs.get("jel", {}).values()]
    spent, decisions, seconds = (
        total([r.get(key) for r in results]) for key in ("controller_seconds", "decisions", "seconds")
    )
    milliseconds, share = ratio(spent, decisions), ratio(spent, seconds)
    return {
        "ms_per_decision": None if milliseconds is None else 1000 * milliseconds,
        "overhead_percent": None if share is None else 100 * share,
    }
