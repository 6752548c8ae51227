"""The report from top to bottom, as blocks for `render`."""

from __future__ import annotations

import math
import re

from scripts.report import tables
from scripts.report.costs import EXPLORATORY_RUNS, exploratory_runs, meta_cost, sweep_cost
from scripts.report.evidence import LABELS, Evidence
from scripts.report.facts import PAPER_SCALE, at_papers_scale, facts
from scripts.report.render import Block
from scripts.report.statistics import MIN_SEEDS, Comparison
from scripts.report.tables import number

CAPTIONS = {  # in the order of the report; a name is its files' stem
    "figure_1_price": "Figure 1. What each method reaches, and what finding its settings cost: mean over the seeds and "
    "standard deviation, in run equivalents on a log axis; equal prices stand side by side. Diamonds: controls at the "
    "price of meta-training. In brackets: runs that a person spent before the sweep or the recipe was written down, "
    "which the axis leaves out. A triangle at the upper edge lies above it.",
    "figure_2_validation": "Figure 2. Validation bits per byte by step: mean of the seeds, and their range as a band.",
    "figure_3_multipliers": "Figure 3. Multipliers of the mean action at each decision, corrections multiplied in, by "
    "the policies that meta-training ended with: each seed's, their median, and their quartiles as a band; dashed, the "
    "best constant.",
    "figure_4_ablations": "Figure 4. What each change to the recipe costs, and each control at the same price: the "
    "mean paired difference from JEL and its 95% interval; in brackets the number of seeds. Filled: the interval of "
    f"at least {MIN_SEEDS} seeds leaves out 0.",
    "figure_meta_training": "Meta-training. Entropy in nats, mean of the action dimensions (0.92 at the start, by "
    "the initial standard deviation), and the returns of each group of episodes: mean of the seeds, and their range.",
}
PROSE = {  # a method's name inside a sentence
    "hand_tuned": "the hand-tuned rates",
    "best_constant": "the best constant",
    "schedule_free": "schedule-free",
    "suboptimal": "the uniform base without a controller",
}
SECTION_TITLES = {
    "ablations": "Ablations and negative results",
    "equal_budget": "Controls at the same price",
    "transfer": "Transfer",
}
SECTION_NOTES = {
    "ablations": "Each row changes one thing in the recipe, learns again with every seed and deploys what it learned. "
    "Run equivalents are the price of one policy; the verdict is JEL's against the row, paired by seed.",
    "equal_budget": "What gets the same knobs and episodes for the same price, but no reinforcement learning or no "
    "schedule. The verdict is JEL's against the row, paired by seed.",
    "transfer": "Policies learned here, used elsewhere without learning again.",
}


def report_blocks(evidence: Evidence, figures: set[str]) -> list[Block]:
    """`figures` are the names of those that were drawn."""

    def picture(name: str) -> list[Block]:
        return [("figure", (name, CAPTIONS[name]))] if name in figures else []

    table, warnings = facts(evidence)
    blocks: list[Block] = [
        ("h1", f"JEL, measured: preset `{evidence.preset}`"),
        ("p", summary(evidence)),
        *picture("figure_1_price"),
        ("p", scale_statement(evidence)),
        *not_measured(evidence),
        ("h2", "Table 1: the methods"),
        ("table", tables.table_1(evidence)),
        ("p", rule()),
        *(("p", note) for note in notes(evidence)),
        *(("p", f"**Warning:** {warning}") for warning in warnings),
        *picture("figure_2_validation"),
        ("h2", "The same runs, as the paper shows them"),
        ("table", tables.validation_table(evidence)),
        (
            "p",
            "Validation bits per byte (bpb) and smoothed training loss at the last step; less is better. Settings "
            "were chosen by validation bpb, of the first seed, so this table flatters every method that was tuned.",
        ),
        ("h2", "Table 3: the schedule-free sweep"),
    ]
    if "schedule-free" in evidence.sweeps:
        blocks += [("table", tables.table_3(evidence))]
    else:
        blocks += [("p", "Not measured.")]
    for what, title, explanation in (
        ("schedule-free-fair", "Schedule-free with a fair share of tuning", fair_note(evidence)),
        (
            "hand-tuned",
            "Tuning of the hand-tuned upper bound",
            f"Around a centre that {EXPLORATORY_RUNS['hand_tuned']} exploratory runs found; "
            "scripts/sweep/settings.py lists them.",
        ),
        (
            "best-constant",
            "The best constant",
            "Multipliers of the uniform base's learning rate and weight decay, held for the whole run under the same "
            "base schedule: as many runs as one policy's meta-training costs. The range, 10 to 100, was set after the "
            "first policies had shown where good rates lie, which is a part of JEL's exploratory runs.",
        ),
    ):
        if what in evidence.sweeps:
            blocks += [("h2", title), ("table", tables.settings_table(evidence, what)), ("p", explanation)]
    blocks += [
        ("h2", "Costs"),
        ("table", tables.cost_table(evidence)),
        (
            "p",
            "A run equivalent is the FLOPs of one run of a sweep's setting: forward and backward passes of its "
            "training and one validation at its end. Probe, validation and test passes count wherever they are made, "
            "so a method's run, with a validation curve and the test split, costs more than 1. Core-seconds are those "
            "of training steps: seconds times threads and ranks on a CPU, times GPUs on CUDA.",
        ),
        ("table", tables.controller_table(evidence)),
    ]
    if evidence.meta:
        blocks += [("h2", "The controller"), *picture("figure_3_multipliers"), *picture("figure_meta_training")]
    for name, rows in evidence.sections.items():
        if rows:
            blocks += [("h2", SECTION_TITLES[name]), ("p", SECTION_NOTES[name])]
            blocks += picture("figure_4_ablations") if name == "ablations" else []
            blocks += [("table", tables.section_table(rows))]
    return [*blocks, ("h2", "What was measured"), ("table", table)]


# -----------------------------------------------------------------------------
# the first paragraph


def summary(evidence: Evidence) -> str:
    """What JEL reaches, and plainly whether it beats the best constant and the other methods."""
    ours = list(evidence.results("jel", "test_bpb").values())
    if not ours:
        return "JEL was not measured: there is no finished run of it that read the test split."
    others = [method for method in evidence.methods() if method not in ("jel", "best_constant")]
    measured = [sentence(PROSE.get(m, m), tables.against(evidence, m)) for m in others if evidence.runs.get(m)]
    parts = [
        f"JEL ends at {tables.mean_std(ours)} bits per byte of the test split.",
        f"**{sentence(PROSE['best_constant'], tables.against(evidence, 'best_constant'))}**",
        *measured,
        *controls(evidence),
    ]
    return " ".join(parts)


def controls(evidence: Evidence) -> list[str]:
    """Whether JEL beats each control at the same price: those that it is not shown to beat come first, in bold."""
    rows = evidence.sections.get("equal_budget", [])
    if not rows:
        return ["Controls at the same price were not measured (`python -m scripts.ablate`)."]
    beaten = [row for row in rows if re.match(r"(JEL is )?better\b", row["verdict"] or "")]
    others = [row for row in rows if row not in beaten]
    listed = lambda rows: "; ".join(f"{row['name']}: {row['verdict'] or 'no verdict'}" for row in rows)
    lost = f"**JEL is not shown to beat {len(others)} of {len(rows)} controls at the same price: {listed(others)}.**"
    won = f"JEL beats {len(beaten)} of {len(rows)} controls at the same price: {listed(beaten)}."
    return [lost] * bool(others) + [won] * bool(beaten)


def sentence(name: str, c: Comparison) -> str:
    """`JEL does not beat the best constant: no difference is shown, -0.0010 [-0.0030, +0.0010].`"""
    if c.n == 0:
        return f"Whether JEL beats {name} was not measured."
    if not math.isfinite(c.difference):
        return f"JEL cannot be compared with {name}: a run diverged."
    size = f"{c.difference:+.4f} bpb" + (f", 95% interval {tables.interval(c)}" if c.interval else "")
    return {
        "better": f"JEL beats {name} ({size}).",
        "worse": f"JEL does worse than {name} ({size}).",
        "no difference shown": f"JEL does not beat {name}: no difference is shown ({size}).",
    }.get(c.verdict, f"Whether JEL beats {name} is undecided with {c.n} of the {MIN_SEEDS} seeds needed ({size}).")


def scale_statement(evidence: Evidence) -> str:
    parameters, steps, batch = PAPER_SCALE
    scale = f"{parameters:,} parameters, {steps} steps x {batch:,} tokens"
    where = (
        f"at the paper's scale ({scale})."
        if at_papers_scale(evidence)
        else f"**not at the paper's scale** ({scale}): compare directions and margins with the paper's, not values."
    )
    return (
        f"Every number here was measured in the runs of preset `{evidence.preset}`, {where} "
        'The paper\'s figures stand only in columns headed "Paper".'
    )


def not_measured(evidence: Evidence) -> list[Block]:
    """What is missing, and the command that measures it."""
    gaps = [
        f"{name}: no finished run (`scripts.sweep --what methods`)"
        for method, name in LABELS.items()
        if method not in evidence.runs
    ]
    gaps += [f"{run}: unfinished, {steps} steps done" for run, steps in evidence.unfinished.items()]
    wanted = {"schedule-free": ", Table 3", "schedule-free-fair": "", "best-constant": ""}
    gaps += [f"the {w} sweep{t} (`scripts.sweep --what {w}`)" for w, t in wanted.items() if w not in evidence.sweeps]
    gaps += [
        f"meta-training with seed {seed}: unfinished, {len(meta.updates)} updates done"
        for seed, meta in evidence.meta.items()
        if not meta.result
    ]
    if not evidence.meta:
        gaps.append("meta-training: not begun (`scripts.meta_train`)")
    if not gaps:
        return []
    command = f"`bash speedrun.sh --preset {evidence.preset}` goes on where it stopped and measures:"
    return [("h2", "Not measured"), ("p", command), ("list", gaps)]


# -----------------------------------------------------------------------------
# notes under the tables


def rule() -> str:
    return (
        "Bits per byte (bpb) of the test split, which nothing that chooses anything has read; less is better. A seed "
        "is everything that is random: initialisation, data order, and for JEL its own meta-training. Two methods "
        "differ if the 95% interval of the paired difference, by Student's t over at least "
        f"{MIN_SEEDS} seeds, leaves out 0. "
        "Prices are in run equivalents (see Costs). A run that recovered from a divergence is marked."
    )


def notes(evidence: Evidence) -> list[str]:
    """What stands beside Table 1."""
    found = []
    if "schedule-free" in evidence.sweeps and "schedule-free-fair" in evidence.sweeps:
        found.append(fair_note(evidence))
    explored = [m for m in EXPLORATORY_RUNS if exploratory_runs(evidence, m)]
    if explored:
        found.append(
            "Exploratory runs are what a person spent, at tiny, before the sweep or the recipe was written down: "
            f"{EXPLORATORY_RUNS['hand_tuned']} for the hand-tuned rates (listed in scripts/sweep/settings.py), roughly "
            f"{EXPLORATORY_RUNS['jel']} runs of tiny for JEL's recipe (an estimate; docs/history.md lists "
            "what was tried)."
        )
    constant, meta = sweep_cost(evidence, "best-constant").runs, meta_cost(evidence).runs
    if constant is not None and meta is not None:
        found.append(
            f"The best constant was found by {constant:.1f} run equivalents; the meta-training of one policy cost "
            f"{meta:.1f}."
        )
    return found


def fair_note(evidence: Evidence) -> str:
    """The best of the paper's 8 settings beside the best of all."""
    best = {}
    for what in ("schedule-free", "schedule-free-fair"):
        rows = evidence.sweeps.get(what, {"rows": []})["rows"]
        best[what] = len(rows), min((r["val_bpb"] for r in rows if r["val_bpb"] is not None), default=None)
    (n, paper), (m, fair) = best.values()
    return (
        f"Schedule-free is the best by validation of {n + m} settings: the paper's {n} (best {number(paper)} bpb of "
        f"the validation split) and {m} more around the best of those (best {number(fair)}), with Muon's rate and "
        "warm-down and the betas of the other methods."
    )
