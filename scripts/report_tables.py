"""The report's text: what was measured -> tables, and the sentences around them. Pure functions of `Evidence`.

The paper's figures stand in columns of their own, named so; where a measurement is missing, the cell says so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanochat.common import format_seconds
from scripts.report_statistics import compare, ratio, relative_change, summarize, total

PAPER_TABLE_1 = {"schedule_free": (1.203, 3.932), "jel": (1.173, 3.810), "hand_tuned": (1.082, 3.507),
                 "suboptimal": (1.453, 4.718)}  # validation bpb, training loss at step 561
PAPER_TABLE_3 = [(0.5, 0.00, 0, 1.456, 9.10), (0.5, 0.01, 0, 1.453, 9.08), (1.0, 0.00, 0, 1.347, 9.10),
                 (1.0, 0.01, 0, 1.348, 9.10), (2.0, 0.00, 0, 1.203, 9.10), (2.0, 0.01, 0, 1.291, 9.11),
                 (1.0, 0.01, 100, 1.396, 9.07), (1.0, 0.01, 300, 1.429, 9.07)]  # lr, wd, warm-up, bpb, minutes
PAPER_SCALE = (73_531_692, 561, 524_288)  # parameters, steps, tokens a step
ABSENT, DIVERGED = "not measured", "diverged"

Table = tuple[list[str], list[list[str]]]  # header, rows


# -----------------------------------------------------------------------------
# tables and cells

def markdown(table: Table) -> str:
    header, rows = [[[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in part] for part in ([table[0]], table[1])]
    rule = ["---:" if right else "---" for right in right_aligned(table)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [*header, rule, *rows])


def plain(table: Table) -> str:
    header, rows = table
    widths, right = [max(map(len, column)) for column in zip(header, *rows)], right_aligned(table)
    line = lambda row: "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)).rstrip()
    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def right_aligned(table: Table) -> list[bool]:
    """Whether each column holds numbers: to the right if nothing in it begins like a word."""
    return [all(cell in (ABSENT, DIVERGED) or not cell[:1].isalpha() for cell in column) for column in list(zip(*table[1])) or table[0]]


def number(value: float | None, spec: str = ".4f") -> str:
    """A measured number; "not measured" for None, "diverged" for one that is not finite."""
    return ABSENT if value is None else format(value, spec) if math.isfinite(value) else DIVERGED


def duration(seconds: float | None) -> str:
    return ABSENT if seconds is None else f"{seconds:.1f}s" if seconds < 60 else format_seconds(seconds)


def label(method: str) -> str:
    return LABELS.get(method, method)


# -----------------------------------------------------------------------------
# Table 1 and its verdicts

def table_1(evidence: Evidence) -> Table:
    header = ["Method", "Val bpb (mean)", "Std", "Seeds", "Train loss (mean)", "Tuning budget", "Paper: val bpb", "Paper: train loss"]
    rows = []
    for method in evidence.methods():
        bpb = summarize(list(evidence.results(method, "val_bpb").values()))
        loss = summarize(list(evidence.results(method, "train_loss").values()))
        paper = [f"{value:.3f}" for value in PAPER_TABLE_1.get(method, ())] or ["-", "-"]
        std = number(bpb.std) if bpb.n != 1 else "-"
        rows.append([label(method), number(bpb.mean), std, str(bpb.n), number(loss.mean), budget(evidence, method), *paper])
    return header, rows


def budget(evidence: Evidence, method: str) -> str:
    """What was spent on choosing the method's hyperparameters."""
    if method == "jel":
        spent = meta_run_equivalents(evidence)["tokens"]
        return "meta-training " + (ABSENT if spent is None else f"= {spent:.1f} runs by tokens")
    if method in evidence.sweeps:
        return f"best of {len(evidence.sweeps[method]['rows'])} settings"
    return {"hand_tuned": "defaults, no tuning here", "suboptimal": "none", "schedule_free": ABSENT}.get(method, "not recorded")


def verdicts(evidence: Evidence) -> Table:
    header = ["JEL against", "Verdict", "Val bpb difference", "Standard error", "Common seeds", "Relative", "Paper: relative"]
    rows, ours = [], evidence.results("jel", "val_bpb")
    for method in evidence.methods():
        if method == "jel":
            continue
        c = compare(ours, evidence.results(method, "val_bpb"))
        paper = "-"
        if method in PAPER_TABLE_1:
            paper = f"{relative_change(PAPER_TABLE_1['jel'][0], PAPER_TABLE_1[method][0]):+.1%}"
        error = "-" if c.n == 1 else number(c.standard_error)
        rows.append([label(method), c.verdict, number(c.difference, "+.4f"), error, str(c.n), number(c.relative, "+.1%"), paper])
    return header, rows


def summary(evidence: Evidence) -> str:
    """Table 1 in a sentence, or nothing if JEL has not been measured."""
    ours = evidence.results("jel", "val_bpb")
    told = []
    for method in evidence.methods():
        c = compare(ours, evidence.results(method, "val_bpb"))
        if method != "jel" and c.n and math.isfinite(c.difference):
            told.append(f"{abs(c.relative):.1%} {'below' if c.difference < 0 else 'above'} {label(method).lower()} ({c.verdict})")
    return f"JEL ends at {number(summarize(list(ours.values())).mean)} validation bpb: {', '.join(told)}." if told else ""


# -----------------------------------------------------------------------------
# sweeps and costs

def table_3(evidence: Evidence) -> Table:
    """The schedule-free sweep. A row's paper columns are filled if the paper's row of that place has the same lr and
    wd, and a warm-up where ours has one (its length is the paper's own column, for runs of other lengths)."""
    header = ["Config", "Schedule-free LR", "WD", "Warm-up", "Val bpb", "Time", "Paper: warm-up", "Paper: val bpb", "Paper: minutes"]
    rows, sweep = [], evidence.sweeps["schedule_free"]
    for i, row in enumerate(sweep["rows"]):
        lr, wd, warmup, bpb, minutes = PAPER_TABLE_3[i] if i < len(PAPER_TABLE_3) else (None,) * 5
        same = (lr, wd) == (row["lr"], row["wd"]) and bool(warmup) == bool(row["warmup"])
        rows.append([f"{i}{' (best)' * (i == sweep['best'])}", f"{row['lr']:g}", f"{row['wd']:g}", str(row["warmup"]),
                     *sweep_measured(row), *([str(warmup), f"{bpb:.3f}", f"{minutes:.2f}"] if same else "---")])
    return header, rows


def tuning_table(evidence: Evidence) -> Table:
    """The tuning of the hand-tuned upper bound: whatever settings its rows name."""
    sweep = evidence.sweeps["hand_tuned"]
    told = {"val_bpb", "seconds", "train_loss", "tokens", "tag"}
    settings = list(dict.fromkeys(key for row in sweep["rows"] for key in row if key not in told))
    rows = [[f"{i}{' (best)' * (i == sweep['best'])}", *(str(row.get(key, "-")) for key in settings), *sweep_measured(row)]
            for i, row in enumerate(sweep["rows"])]
    return ["Config", *settings, "Val bpb", "Time"], rows


def sweep_measured(row: dict) -> list[str]:
    bpb = DIVERGED if row["val_bpb"] is None and row["seconds"] is not None else number(row["val_bpb"])
    return [bpb, duration(row["seconds"])]


def cost_table(evidence: Evidence) -> Table:
    header = ["Cost of", "Made of", "Tokens", "Runs by tokens", "Seconds", "Runs by seconds", "Paper: runs"]
    one = run_cost(evidence)
    result = evidence.meta.result if evidence.meta and evidence.meta.result else {}
    made_of = f"{result['updates']} updates, {result['episodes']} episodes" if result else ABSENT
    costs = [("one JEL run", f"mean of {len(evidence.runs.get('jel', {}))} seeds", one["tokens"], one["seconds"], "1"),
             ("meta-training", made_of, result.get("tokens"), result.get("seconds"), "5.6")]
    for method, name, paper in (("schedule_free", "schedule-free sweep", "8"), ("hand_tuned", "hand-tuned tuning", "not stated")):
        rows = evidence.sweeps[method]["rows"] if method in evidence.sweeps else []
        costs.append((name, f"{len(rows)} runs" if rows else ABSENT, total([row.get("tokens") for row in rows]),
                      total([row["seconds"] for row in rows]), paper))
    return header, [[name, parts, number(tokens, ",.0f"), number(ratio(tokens, one["tokens"]), ".2f"), number(seconds, ",.1f"),
                     number(ratio(seconds, one["seconds"]), ".2f"), paper] for name, parts, tokens, seconds, paper in costs]


def controller_table(evidence: Evidence) -> Table:
    cost = controller_cost(evidence)
    return ["Controller", "Measured", "Paper"], [
        ["milliseconds a decision", number(cost["ms_per_decision"], ".3f"), "below 0.5"],
        ["percent of a run's time", number(cost["overhead_percent"], ".3f"), "below 0.3"]]


def ablation_table(evidence: Evidence) -> Table:
    """JEL as it stands first, then each variant; relative to JEL's mean, without a verdict (the seeds are not named)."""
    jel = list(evidence.results("jel", "val_bpb").values())
    rows = []
    for row in [{"what": "JEL as above", "val_bpb": jel}, *evidence.ablations]:
        s = summarize([math.nan if v is None else v for v in row["val_bpb"]])
        relative = number(relative_change(s.mean, summarize(jel).mean), "+.1%") if s.n and jel else "-"
        rows.append([row["what"], number(s.mean), number(s.std) if s.n > 1 else "-", str(s.n), relative, row.get("note", "")])
    return ["What", "Val bpb (mean)", "Std", "Runs", "Against JEL", "Note"], rows


# -----------------------------------------------------------------------------
# what the numbers are of

def describe_data(config: dict) -> str:
    data = config["data"]
    size = data.get("bytes", data["shard_bytes"])
    counts = ", ".join(f"{data[key]:,} {key}" for key in ("files", "documents", "shards") if key in data)
    return f"{data.get('source', config['flags']['data'])}: {counts}, {size:,} bytes, sha256 {data['sha256'][:16]}"


def describe_model(config: dict) -> str:
    m = config["model"]
    return f"{m['n_layer']} layers, {m['n_embd']} wide, vocabulary {m['vocab_size']:,}, {config['parameters']:,} parameters"


def describe_length(config: dict) -> str:
    steps, batch = config["num_iterations"], config["flags"]["total_batch_size"]
    return f"{steps:,} steps x {batch:,} tokens = {steps * batch:,} tokens, context {config['model']['sequence_len']:,}"


def describe_device(config: dict) -> str:
    e = config["environment"]
    return f"{e['device']}, {e['world_size']} rank{'s' * (e['world_size'] != 1)}, {e['threads']} CPU threads"


def describe_versions(config: dict) -> str:
    return f"Python {config['environment']['python']}, torch {config['environment']['torch']}"


def distinct(configs: Sequence[dict], describe: Callable[[dict], str]) -> list[str]:
    return list(dict.fromkeys(map(describe, configs)))


def facts(evidence: Evidence) -> tuple[Table, list[str]]:
    """What the numbers are of, and a warning for everything in which runs differ that are to be compared."""
    runs, meta = evidence.configs(), [evidence.meta.config] if evidence.meta else []
    seeds = sorted({seed for by_seed in evidence.runs.values() for seed in by_seed})
    told = {"Data": distinct(runs + meta, describe_data), "Model": distinct(runs, describe_model),
            "Run": distinct(runs, describe_length), "Seeds": [", ".join(map(str, seeds))] if seeds else [],
            "Policy of the JEL runs": policies(evidence), "Device": distinct(runs + meta, describe_device),
            "Versions": distinct(runs + meta, describe_versions),
            "Git commit": distinct(runs + meta, lambda c: c["environment"]["commit"] or "none")}
    hurts = {"Data": "the methods", "Model": "the methods", "Run": "the methods", "Policy of the JEL runs": "the JEL runs",
             "Device": "the seconds"}
    warnings = [f"{what} differs between these runs, so {hurts[what]} cannot be compared: {'; '.join(told[what])}."
                for what in hurts if len(told[what]) > 1]
    if evidence.meta and evidence.meta.result and set(policies(evidence)) - {stem(evidence.meta.result["policy"])}:
        warnings.append("The JEL runs used another policy than the one whose meta-training is reported here.")
    sweep = evidence.sweeps.get("schedule_free")
    if sweep and sweep["best"] is not None:
        best = tuple(sweep["rows"][sweep["best"]][key] for key in ("lr", "wd", "warmup"))
        used = {tuple(run.config["flags"][f"sf_{key}"] for key in ("lr", "wd", "warmup")) for run in evidence.runs.get("schedule_free", {}).values()}
        if used - {best}:
            warnings.append("The schedule-free runs of Table 1 do not have the setting that was best in the sweep.")
    return (["What", "These numbers"], [[what, "; ".join(values) or ABSENT] for what, values in told.items()]), warnings


def policies(evidence: Evidence) -> list[str]:
    return distinct([run.config for run in evidence.runs.get("jel", {}).values()],
                    lambda c: stem(c["flags"]["policy"]) if c["flags"]["policy"] else "the one shipped with the package")


def stem(policy: str) -> str:
    """A policy's path, whole, without the suffix that either of its files has."""
    return os.path.abspath(policy.removesuffix(".safetensors").removesuffix(".json"))
