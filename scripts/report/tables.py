"""The report's tables: pure functions of `Evidence`.

The paper's figures stand in columns of their own, headed so. Where a measurement is missing, the cell says so.
"""

from __future__ import annotations

import math

from nanochat.run_log import format_seconds
from scripts.report.costs import (
    Price,
    controller_cost,
    exploratory_runs,
    in_runs,
    meta_cost,
    run_cost,
    sweep_cost,
    tuning_cost,
    tuning_parts,
    unit,
)
from scripts.report.evidence import LABELS, Evidence
from scripts.report.render import EMPTY_CELLS, Table
from scripts.report.statistics import Comparison, compare, relative_change, summarize

PAPER_TABLE_1 = {
    "schedule_free": (1.203, 3.932),
    "jel": (1.173, 3.810),
    "hand_tuned": (1.082, 3.507),
    "suboptimal": (1.453, 4.718),
}  # validation bpb, training loss at step 561
PAPER_TABLE_3 = [
    (0.5, 0.00, 0, 1.456, 9.10),
    (0.5, 0.01, 0, 1.453, 9.08),
    (1.0, 0.00, 0, 1.347, 9.10),
    (1.0, 0.01, 0, 1.348, 9.10),
    (2.0, 0.00, 0, 1.203, 9.10),
    (2.0, 0.01, 0, 1.291, 9.11),
    (1.0, 0.01, 100, 1.396, 9.07),
    (1.0, 0.01, 300, 1.429, 9.07),
]  # lr, wd, warm-up, bpb, minutes
ABSENT, DIVERGED = EMPTY_CELLS


# -----------------------------------------------------------------------------
# cells


def number(value: float | None, spec: str = ".4f") -> str:
    """A measured number; "not measured" for None, "diverged" for one that is not finite."""
    return ABSENT if value is None else format(value, spec) if math.isfinite(value) else DIVERGED


def mean_std(values: list[float]) -> str:
    """`1.9785 ± 0.0063 (5)`; without the deviation where one value has none."""
    s = summarize(values)
    if s.mean is None or not math.isfinite(s.mean):
        return number(s.mean)
    return f"{s.mean:.4f}{'' if s.std is None else f' ± {s.std:.4f}'} ({s.n})"


def interval(c: Comparison) -> str:
    return "-" if c.interval is None else "[{:+.4f}, {:+.4f}]".format(*c.interval)


def duration(seconds: float | None) -> str:
    return ABSENT if seconds is None else f"{seconds:.1f}s" if seconds < 60 else format_seconds(seconds)


def label(method: str) -> str:
    return LABELS.get(method, method)


def against(evidence: Evidence, method: str) -> Comparison:
    """JEL minus the method on the test split, seed by seed."""
    return compare(evidence.results("jel", "test_bpb"), evidence.results(method, "test_bpb"))


# -----------------------------------------------------------------------------
# Table 1


def table_1(evidence: Evidence) -> Table:
    rows = []
    for method in evidence.methods():
        c = against(evidence, method)
        verdict = ["-", "-", "-"]
        if method != "jel":
            verdict = [number(c.difference, "+.4f"), interval(c), c.verdict]
        rows.append(
            [
                label(method),
                mean_std(list(evidence.results(method, "test_bpb").values())),
                recoveries(evidence, method),
                *verdict,
                number(run_cost(evidence, method).runs, ".2f"),
                tuning(evidence, method),
            ]
        )
    return [
        "Method",
        "Test bpb, mean ± std (n)",
        "Recoveries",
        "JEL minus it",
        "95% interval",
        "JEL is",
        "Price of a run",
        "Price of its tuning",
    ], rows


def recoveries(evidence: Evidence, method: str) -> str:
    """`0`, or `3 (s43: 2, s45: 1)`."""
    counts = evidence.results(method, "recoveries")
    marked = ", ".join(f"s{seed}: {count:.0f}" for seed, count in counts.items() if count)
    return ABSENT if not counts else f"{sum(counts.values()):.0f}" + (f" ({marked})" if marked else "")


def tuning(evidence: Evidence, method: str) -> str:
    """`45.0 = 8.0 sweep hand-tuned + 37 exploratory`, in runs."""
    parts = [f"{number(price.runs, '.1f')} {name}" for name, price in tuning_parts(evidence, method)]
    explored = exploratory_runs(evidence, method)
    parts += [f"{explored} exploratory"] if explored else []
    if method not in LABELS:
        return "not recorded"
    if method == "suboptimal":
        return "0"
    if method == "hand_tuned" and "hand-tuned" not in evidence.sweeps:
        return "defaults; what found them is not known"
    whole = tuning_cost(evidence, method)
    return ABSENT if whole is None else f"{whole:.1f} = {' + '.join(parts)}"


def validation_table(evidence: Evidence) -> Table:
    """The same runs by what the paper's Table 1 shows: validation bpb and training loss."""
    rows, ours = [], evidence.results("jel", "val_bpb")
    for method in evidence.methods():
        paper = [f"{value:.3f}" for value in PAPER_TABLE_1.get(method, ())] or ["-", "-"]
        c = compare(ours, evidence.results(method, "val_bpb"))
        change = paper_change = "-"
        if method != "jel":
            change = number(c.relative, "+.1%")
            if method in PAPER_TABLE_1:
                paper_change = f"{relative_change(PAPER_TABLE_1['jel'][0], PAPER_TABLE_1[method][0]):+.1%}"
        losses = list(evidence.results(method, "train_loss").values())
        bpb = mean_std(list(evidence.results(method, "val_bpb").values()))
        rows.append([label(method), bpb, mean_std(losses), change, *paper, paper_change])
    return [
        "Method",
        "Val bpb, mean ± std (n)",
        "Train loss, mean ± std (n)",
        "JEL relative to it",
        "Paper: val bpb",
        "Paper: train loss",
        "Paper: JEL relative to it",
    ], rows


# -----------------------------------------------------------------------------
# sweeps


def table_3(evidence: Evidence) -> Table:
    """The schedule-free sweep. The paper's columns are filled where its row of the same place has our lr and wd, and a
    warm-up if ours has one: a warm-up's length depends on the run's, so the paper's stands in a column too."""
    sweep, rows = evidence.sweeps["schedule-free"], []
    for i, row in enumerate(sweep["rows"]):
        paper = ["-", "-", "-"]
        if i < len(PAPER_TABLE_3):
            lr, wd, warmup, bpb, minutes = PAPER_TABLE_3[i]
            if (lr, wd, warmup > 0) == (row["lr"], row["wd"], row["warmup"] > 0):
                paper = [str(warmup), f"{bpb:.3f}", f"{minutes:.2f}"]
        settings = [f"{row['lr']:g}", f"{row['wd']:g}", str(row["warmup"])]
        rows.append([config_name(i, sweep), *settings, *measured(row), *paper])
    return [
        "Config",
        "Schedule-free LR",
        "WD",
        "Warm-up",
        "Val bpb",
        "Time",
        "Paper: warm-up",
        "Paper: val bpb",
        "Paper: minutes",
    ], rows


def settings_table(evidence: Evidence, what: str) -> Table:
    """Any other sweep: whatever settings its rows name."""
    sweep = evidence.sweeps[what]
    results = {"val_bpb", "train_loss", "seconds", "core_seconds", "flops", "tokens", "recoveries"}
    settings = list(dict.fromkeys(key for row in sweep["rows"] for key in row))
    settings = [key for key in settings if key not in results | {"tag", "flags", "error"}]
    return ["Config", *settings, "Val bpb", "Time"], [
        [config_name(i, sweep), *(str(row.get(key, "-")) for key in settings), *measured(row)]
        for i, row in enumerate(sweep["rows"])
    ]


def config_name(i: int, sweep: dict) -> str:
    return f"{i} (best)" if i == sweep["best"] else str(i)


def measured(row: dict) -> list[str]:
    """A sweep row's bpb and time; a run that took time and left no bpb has diverged. A recovered one is marked."""
    diverged = row["val_bpb"] is None and row["seconds"] is not None
    mark = " (recovered)" if row.get("recoveries") else ""
    return [DIVERGED if diverged else number(row["val_bpb"]) + mark, duration(row["seconds"])]


# -----------------------------------------------------------------------------
# costs and further evidence


def cost_table(evidence: Evidence) -> Table:
    metas = [meta.result for meta in evidence.meta.values() if meta.result]
    rows = [
        (
            "one run, the unit",
            "median setting",
            Price(in_runs(evidence, unit(evidence)), unit(evidence, "core_seconds")),
        )
    ]
    for method in evidence.methods():
        n = len(evidence.runs.get(method, {}))
        rows.append((f"a run of {label(method)}", f"mean of {n} seeds" if n else ABSENT, run_cost(evidence, method)))
    made_of = ABSENT
    if metas:
        made_of = f"{metas[0]['updates']} updates, {metas[0]['episodes']} episodes; mean of {len(metas)} seeds"
    rows.append(("meta-training of one policy", made_of, meta_cost(evidence)))
    for what in ("schedule-free", "schedule-free-fair", "hand-tuned", "best-constant"):
        settings = len(evidence.sweeps[what]["rows"]) if what in evidence.sweeps else 0
        rows.append((f"sweep {what}", f"{settings} settings" if settings else ABSENT, sweep_cost(evidence, what)))
    return ["Cost of", "Made of", "Run equivalents", "Core-seconds"], [
        [name, made_of, number(price.runs, ".2f"), number(price.core_seconds, ",.1f")] for name, made_of, price in rows
    ]


def controller_table(evidence: Evidence) -> Table:
    cost = controller_cost(evidence)
    return ["The controller's cost", "Measured", "Paper"], [
        ["milliseconds a decision", number(cost["ms_per_decision"], ".3f"), "< 0.5"],
        ["percent of a run's time", number(cost["overhead_percent"], ".3f"), "< 0.3"],
    ]


def section_table(rows: list[dict]) -> Table:
    """Rows of ablations, equal budgets or transfers, as scripts.ablate judged them."""
    return ["What", "Test bpb, mean ± std (n)", "Run equivalents", "Verdict"], [
        [
            row["name"],
            mean_std([math.nan if v is None else v for v in row["test_bpb"]]),
            number(row["run_equivalents"], ".1f"),
            row["verdict"] or "-",
        ]
        for row in rows
    ]
