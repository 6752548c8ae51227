"""Write the paper's tables and figures from the runs of a preset, as they were measured.

    python -m scripts.report --preset tiny                  runs/tiny/ -> report/: report.md, report.html, results.json
    python -m scripts.report --preset tiny --print-table    Table 1 on the terminal, and nothing written

Figures are written as PNG and SVG; report.html is one file with its figures inside. Equal runs give an equal report,
byte for byte. What is missing is named, with the command that measures it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np

from nanochat.common import UserError, base_dir, print0, run_main
from nanochat.files import write_json
from scripts.presets import add_preset_flag, parse_with_preset
from scripts.report import tables
from scripts.report.costs import controller_cost, meta_cost
from scripts.report.evidence import SECTIONS, Evidence, MetaTraining, read_evidence
from scripts.report.render import plain, to_html, to_markdown
from scripts.report.text import CAPTIONS, report_blocks, summary

# -----------------------------------------------------------------------------
# results.json and the figures


def results_record(evidence: Evidence) -> dict:
    """What `results.json` holds; what was not measured is null or empty, what diverged is null."""
    of_a_run = ("test_bpb", "val_bpb", "train_loss", "seconds", "recoveries")
    finished = [meta.result for meta in evidence.meta.values() if meta.result]
    return {
        "preset": evidence.preset,
        "methods": {
            method: {
                key: finite(run.result[key] for _, run in sorted(evidence.runs[method].items())) for key in of_a_run
            }
            for method in evidence.methods()
            if method in evidence.runs
        },
        "schedule_free_sweep": [
            {"sweep": what} | {key: value for key, value in row.items() if key not in ("flags", "tag", "error")}
            for what in ("schedule-free", "schedule-free-fair")
            for row in evidence.sweeps.get(what, {"rows": []})["rows"]
        ],
        "meta": {
            "updates": finished[0]["updates"] if finished else None,
            "episodes": finished[0]["episodes"] if finished else None,
            "entropy": mean_by_update(evidence, "entropy"),
            "return_mean": mean_by_update(evidence, "return_mean"),
            "run_equivalents": meta_cost(evidence).runs,
        },
        "controller": controller_cost(evidence),
        **{name: evidence.sections.get(name, []) for name in SECTIONS},
    }


def finite(values) -> list[float | None]:
    return [float(v) if v is not None and math.isfinite(v) else None for v in values]


def by_update(evidence: Evidence, key: str) -> np.ndarray:
    """One number of meta-training's log -> (seeds, updates), up to the update that all seeds have."""
    logs = [meta.updates for meta in evidence.meta.values() if meta.updates]
    updates = min(map(len, logs), default=0)
    return np.array([[record[key] for record in log[:updates]] for log in logs], dtype=np.float64).reshape(
        len(logs), updates
    )


def mean_by_update(evidence: Evidence, key: str) -> list[float | None]:
    values = by_update(evidence, key)
    return finite(values.mean(0)) if values.size else []


def final_policies(evidence: Evidence) -> list[dict]:
    """The last update of each seed's meta-training, of those that decide as often and turn the same groups."""

    def shape(meta: MetaTraining) -> tuple:
        last = meta.updates[-1]
        return last["decision_progress"], {group: sorted(own) for group, own in last["multipliers"].items()}

    metas = [meta for meta in evidence.meta.values() if meta.updates and "*" in meta.updates[-1]["multipliers"]]
    return [meta.updates[-1] for meta in metas if shape(meta) == shape(metas[0])]


def multipliers_by_groups(policies: list[dict]) -> dict[str, dict[str, list]]:
    """{hyperparameter: {param groups: (S, K)}}, corrections multiplied in; groups that are set alike stand once."""
    found: dict[str, dict[str, list]] = {}
    every = [policy["multipliers"] for policy in policies]
    for key in every[0]["*"]:
        alike: dict[str, list[str]] = {}
        for group in every[0]:
            values = [policy[group].get(key, policy["*"][key]) for policy in every]
            alike.setdefault(json.dumps(values), []).append(group)
        named = {groups_label(groups, len(alike)): json.loads(values) for values, groups in alike.items()}
        found[key] = named
    return found


def groups_label(groups: list[str], sets: int) -> str:
    if "*" in groups:
        return "all groups" if sets == 1 else "block matrices"  # nanochat's only groups without a name of their own
    return ", ".join(groups)


def draw(evidence: Evidence, folder: Path) -> set[str]:
    """Write the figures that can be drawn; returns their names. Without matplotlib that is none, which a line says."""
    try:
        from scripts.report import figures
        from scripts.report.price_figure import price_figure, price_points
    except ImportError as e:
        print0(f"no figures: {e.name} is not installed")
        return set()
    subtitle, drawn = f"measured: preset {evidence.preset}", {}
    points = price_points(evidence)
    if points:
        drawn["figure_1_price"] = price_figure(points, subtitle)
    curves = evidence.curves()
    if curves:
        labels = {method: tables.label(method) for method in curves}
        drawn["figure_2_validation"] = figures.validation_figure(curves, labels, subtitle)
    policies, best = final_policies(evidence), evidence.best_row("best_constant")
    if policies:
        constant = {"lr": best["lr_multiplier"], "weight_decay": best["wd_multiplier"]} if best else {}
        multipliers = multipliers_by_groups(policies)
        drawn["figure_3_multipliers"] = figures.multiplier_figure(
            policies[0]["decision_progress"], multipliers, constant, subtitle
        )
    if by_update(evidence, "entropy").size:
        columns = [by_update(evidence, key) for key in ("entropy", "return_mean", "return_best")]
        drawn["figure_meta_training"] = figures.meta_training_figure(*columns, subtitle)
    measured = [row for name in ("ablations", "equal_budget") for row in evidence.sections.get(name, [])]
    compared = [row for row in measured if row.get("difference") is not None and math.isfinite(row["difference"])]
    if compared:
        drawn["figure_4_ablations"] = figures.ablation_figure(compared, subtitle)
    for name, figure in drawn.items():
        figures.save_figure(figure, folder, name)
    return set(drawn)


# -----------------------------------------------------------------------------


def write_report(evidence: Evidence, folder: Path) -> None:
    """Make the whole report aside, then move it into `folder`: a failure leaves the former one as it was."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=folder.parent) as temporary:
            aside = Path(temporary)
            figures = draw(evidence, aside)
            blocks = report_blocks(evidence, figures)
            (aside / "report.md").write_text(to_markdown(blocks), encoding="utf-8")
            (aside / "report.html").write_text(to_html(blocks, aside), encoding="utf-8")
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
    print0(f"Table 1, preset {args.preset}\n")
    print0(plain(tables.table_1(evidence)), summary(evidence).replace("**", ""), sep="\n\n")
    if not args.print_table:
        write_report(evidence, base_dir() / "report")
        print0(f"\nreport: {base_dir() / 'report' / 'report.md'} and report.html")


if __name__ == "__main__":
    run_main(main)
