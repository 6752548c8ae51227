"""Write the paper's tables and figures from the runs of a preset, as they were measured.

    python -m scripts.report --preset tiny                  runs/tiny/ -> report/report.md, results.json, figures
    python -m scripts.report --preset tiny --print-table    Table 1 on the terminal, and nothing written

Equal runs give an equal report, byte for byte. What is missing is named, with the command that measures it.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from pathlib import Path

from nanochat.common import UserError, base_dir, print0, run_main
from nanochat.files import write_json
from scripts.presets import add_preset_flag, parse_with_preset
from scripts.report import tables
from scripts.report.evidence import LABELS, Evidence, controller_cost, meta_run_equivalents, read_evidence
from scripts.report.figures import meta_training_figure, multiplier_figure, save_figure, validation_figure

# In the order of the report; a name is its files' stem.
CAPTIONS = {
    "figure_2_validation": "Figure 2. Validation bits per byte by step: mean of the seeds, and their range as a band.",
    "figure_3_multipliers": "Figure 3. The policy's mean multipliers at each decision: median and quartiles over the "
    "updates of meta-training, and those of the last policy.",
    "figure_meta_training": "Meta-training. Entropy in nats, mean of the two action dimensions (0.92 at the start, by "
    "the initial standard deviation), and the returns of each group of episodes.",
}


# -----------------------------------------------------------------------------
# results.json and the figures


def results_record(evidence: Evidence) -> dict:
    """What `results.json` holds; what was not measured is null or empty, what diverged is null."""
    of_a_run, of_a_row = ("val_bpb", "train_loss", "seconds"), ("lr", "wd", "warmup", "val_bpb", "seconds")
    sweep = evidence.sweeps.get("schedule_free", {"rows": []})["rows"]
    return {
        "preset": evidence.preset,
        "methods": {
            method: {key: finite(evidence.results(method, key).values()) for key in of_a_run}
            for method in evidence.methods()
            if method in evidence.runs
        },
        "schedule_free_sweep": [{key: row[key] for key in of_a_row} for row in sweep],
        "meta": {
            "updates": len(evidence.updates),
            "episodes": evidence.meta_result.get("episodes"),
            "entropy": finite(r["entropy"] for r in evidence.updates),
            "return_mean": finite(r["return_mean"] for r in evidence.updates),
            "run_equivalents": meta_run_equivalents(evidence),
        },
        "controller": controller_cost(evidence),
    }


def finite(values) -> list[float | None]:
    return [v if v is not None and math.isfinite(v) else None for v in values]


def draw(evidence: Evidence, folder: Path) -> set[str]:
    """Write the figures that can be drawn; returns their names."""
    subtitle, drawn = f"measured: preset {evidence.preset}", {}
    curves = evidence.curves()
    if curves:
        labels = {method: tables.label(method) for method in curves}
        drawn["figure_2_validation"] = validation_figure(curves, labels, subtitle)
    if evidence.updates:
        column = {
            key: [record[key] for record in evidence.updates]
            for key in ("lr", "weight_decay", "entropy", "return_mean", "return_best")
        }
        drawn["figure_3_multipliers"] = multiplier_figure(
            evidence.updates[-1]["decision_progress"], column["lr"], column["weight_decay"], subtitle
        )
        drawn["figure_meta_training"] = meta_training_figure(
            column["entropy"], column["return_mean"], column["return_best"], subtitle
        )
    for name, figure in drawn.items():
        save_figure(figure, folder, name)
    return set(drawn)


# -----------------------------------------------------------------------------
# report.md


def report_text(evidence: Evidence, figures: set[str]) -> str:
    """The report from top to bottom; `figures` are the names of those that were drawn."""

    def picture(name: str) -> list[str]:
        return [f"![{CAPTIONS[name]}]({name}.png)", CAPTIONS[name]] if name in figures else []

    facts, warnings = tables.facts(evidence)
    parts = [
        f"# JEL, measured: preset `{evidence.preset}`",
        scale_statement(evidence),
        tables.summary(evidence),
        tables.markdown(facts),
        *(f"**Warning:** {warning}" for warning in warnings),
        *not_measured(evidence),
    ]

    parts += [
        "## Table 1: four methods",
        tables.markdown(tables.table_1(evidence)),
        "Validation bits per byte (bpb) and smoothed training loss at the last step; less is better. Every "
        'method\'s tuning budget stands beside it, equal or not, and its price under "Costs". A sweep chooses '
        "its best setting by validation bpb; the policy never sees validation data.",
        tables.markdown(tables.verdicts(evidence)),
        'JEL is "better" or "worse" if the paired difference (same seeds, same data order) over at least 3 '
        "seeds exceeds twice its standard error. Relative: difference of the means over the other method's mean; "
        "negative where JEL is better.",
        *picture("figure_2_validation"),
    ]

    parts += ["## Table 3: the schedule-free sweep"]
    parts += [tables.markdown(tables.table_3(evidence))] if "schedule_free" in evidence.sweeps else ["Not measured."]
    if "hand_tuned" in evidence.sweeps:
        parts += [
            "## Tuning of the hand-tuned upper bound",
            tables.markdown(tables.tuning_table(evidence)),
            f"Its budget: these {len(evidence.sweeps['hand_tuned']['rows'])} settings, best by validation bpb, "
            "around a centre that earlier single runs found (listed in scripts/sweep.py).",
        ]

    parts += [
        "## Costs",
        tables.markdown(tables.cost_table(evidence)),
        '"Runs" are run equivalents: multiples of one deployed JEL run, by training tokens and by measured '
        "seconds (a run's are those of its training steps, without validation). Meta-training is paid once; a "
        "deployment afterwards costs one run.",
        tables.markdown(tables.controller_table(evidence)),
    ]

    if evidence.updates:
        parts += ["## The controller", *picture("figure_3_multipliers"), *picture("figure_meta_training")]
    if evidence.ablations:
        parts += [
            "## Ablations and negative results",
            tables.markdown(tables.ablation_table(evidence)),
            "Less is better; relative to the mean of the JEL runs above.",
        ]
    return "\n\n".join(filter(None, parts)) + "\n"


def scale_statement(evidence: Evidence) -> str:
    parameters, steps, batch = tables.PAPER_SCALE
    scale = f"{parameters:,} parameters, {steps} steps x {batch:,} tokens"
    at_scale = {tables.scale(config) for config in evidence.configs()} == {tables.PAPER_SCALE}
    return (
        f"Every number here was measured in the runs of preset `{evidence.preset}`, "
        + (
            f"at the paper's scale ({scale})."
            if at_scale
            else f"**not at the paper's scale** ({scale}): set directions and margins beside the paper's, not values."
        )
        + ' The paper\'s figures stand only in columns headed "Paper".'
    )


def not_measured(evidence: Evidence) -> list[str]:
    """What is missing, and the command that measures it."""
    gaps = [
        f"{name}: no finished run (`scripts.base_train`)"
        for method, name in LABELS.items()
        if method not in evidence.runs
    ]
    gaps += [
        f"{run}: unfinished, {steps} steps done (`scripts.base_train`)" for run, steps in evidence.unfinished.items()
    ]
    if "schedule_free" not in evidence.sweeps:
        gaps.append("the schedule-free sweep, Table 3 (`scripts.sweep`)")
    if not evidence.meta_result:
        done = f"unfinished, {len(evidence.updates)} updates done" if evidence.meta_config else "not begun"
        gaps.append(f"meta-training: {done} (`scripts.meta_train`)")
    if not gaps:
        return []
    return [
        "## Not measured",
        f"`bash speedrun.sh --preset {evidence.preset}` goes on where it stopped and measures:",
        "\n".join(f"- {gap}" for gap in gaps),
    ]


# -----------------------------------------------------------------------------


def write_report(evidence: Evidence, folder: Path) -> None:
    """Make the whole report aside, then move it into `folder`: a failure leaves the former one as it was."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=folder.parent) as temporary:
            aside = Path(temporary)
            figures = draw(evidence, aside)
            (aside / "report.md").write_text(report_text(evidence, figures), encoding="utf-8")
            write_json(aside / "results.json", results_record(evidence))
            for path in sorted(aside.iterdir()):
                os.replace(path, folder / path.name)
        for name in CAPTIONS.keys() - figures:  # a former report's, of other runs
            for suffix in ("png", "svg"):
                (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"cannot write the report to {folder} ({e.strerror or e}); make room, then try again") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_preset_flag(parser)
    parser.add_argument("--print-table", action="store_true", help="print Table 1 only; write nothing")
    args = parse_with_preset(parser, "report")
    evidence = read_evidence(base_dir() / "runs", args.preset)
    print0(f"Table 1, preset {args.preset} (the paper's columns are of its own scale and data)\n")
    print0(tables.plain(tables.table_1(evidence)), tables.plain(tables.verdicts(evidence)), sep="\n\n")
    if not args.print_table:
        write_report(evidence, base_dir() / "report")
        print0(f"\nreport: {base_dir() / 'report' / 'report.md'}")


if __name__ == "__main__":
    run_main(main)
