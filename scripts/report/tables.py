"""The report's tables: pure functions of `Evidence`.

The paper's figures stand in columns of their own, headed so. Where a measurement is missing, the cell says so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

from nanochat.run_log import format_seconds
from scripts.report.evidence import LABELS, Evidence, controller_cost, meta_run_equivalents, run_cost
from scripts.report.statistics import compare, ratio, relative_change, summarize, total

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
PAPER_SCALE = (73_531_692, 561, 524_288)  # parameters, steps, tokens a step
ABSENT, DIVERGED = "not measured", "diverged"

Table = tuple[list[str], list[list[str]]]  # header, rows


# -----------------------------------------------------------------------------
# tables and cells


def markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"

    header, rows = table
    rule = ["---:" if right else "---" for right in right_aligned(table)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def plain(table: Table) -> str:
    header, rows = table
    widths, right = [max(map(len, column)) for column in zip(header, *rows)], right_aligned(table)

    def line(cells: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right)).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def right_aligned(table: Table) -> list[bool]:
    """Which columns hold numbers: those in which nothing begins like a word."""
    header, rows = table
    return [all(row[i] in (ABSENT, DIVERGED) or not row[i][:1].isalpha() for row in rows) for i in range(len(header))]


def number(value: float | None, spec: str = ".4f") -> str:
    """A measured number; "not measured" for None, "diverged" for one that is not finite."""
    return ABSENT if value is None else format(value, spec) if math.isfinite(value) else DIVERGED


def spread(value: float | None, n: int) -> str:
    """A deviation or a standard error; "-" where one value has none."""
    return "-" if n == 1 else number(value)


def duration(seconds: float | None) -> str:
    return ABSENT if seconds is None else f"{seconds:.1f}s" if seconds < 60 else format_seconds(seconds)


def label(method: str) -> str:
    return LABELS.get(method, method)


# -----------------------------------------------------------------------------
# Table 1 and its verdicts


def table_1(evidence: Evidence) -> Table:
    rows = []
    for method in evidence.methods():
        bpb = summarize(list(evidence.results(method, "val_bpb").values()))
        loss = summarize(list(evidence.results(method, "train_loss").values()))
        paper = [f"{value:.3f}" for value in PAPER_TABLE_1.get(method, ())] or ["-", "-"]
        rows.append(
            [
                label(method),
                number(bpb.mean),
                spread(bpb.std, bpb.n),
                str(bpb.n),
                number(loss.mean),
                budget(evidence, method),
                *paper,
            ]
        )
    return [
        "Method",
        "Val bpb (mean)",
        "Std",
        "Seeds",
        "Train loss (mean)",
        "Tuning budget",
        "Paper: val bpb",
        "Paper: train loss",
    ], rows


def budget(evidence: Evidence, method: str) -> str:
    """What was spent on choosing the method's hyperparameters."""
    if method == "jel":
        spent = meta_run_equivalents(evidence)["tokens"]
        return f"meta-training {ABSENT if spent is None else f'= {spent:.1f} runs by tokens'}"
    if method in evidence.sweeps:
        return f"best of {len(evidence.sweeps[method]['rows'])} settings"
    return {"hand_tuned": "defaults, no tuning here", "suboptimal": "none"}.get(method, "not recorded")


def verdicts(evidence: Evidence) -> Table:
    rows, ours = [], evidence.results("jel", "val_bpb")
    for method in evidence.methods():
        if method == "jel":
            continue
        c = compare(ours, evidence.results(method, "val_bpb"))
        paper = "-"
        if method in PAPER_TABLE_1:
            paper = f"{relative_change(PAPER_TABLE_1['jel'][0], PAPER_TABLE_1[method][0]):+.1%}"
        rows.append(
            [
                label(method),
                c.verdict,
                number(c.difference, "+.4f"),
                spread(c.standard_error, c.n),
                str(c.n),
                number(c.relative, "+.1%"),
                paper,
            ]
        )
    return [
        "JEL against",
        "Verdict",
        "Val bpb difference",
        "Standard error",
        "Common seeds",
        "Relative",
        "Paper: relative",
    ], rows


def summary(evidence: Evidence) -> str:
    """Table 1 in a sentence, or nothing if there is nothing to compare."""
    ours, told = evidence.results("jel", "val_bpb"), []
    for method in evidence.methods():
        c = compare(ours, evidence.results(method, "val_bpb"))
        if method != "jel" and c.n and math.isfinite(c.difference):
            side = "below" if c.difference < 0 else "above"
            told.append(f"{abs(c.relative):.1%} {side} {label(method)} ({c.verdict})")
    mean = number(summarize(list(ours.values())).mean)
    return f"JEL ends at {mean} validation bits per byte: {', '.join(told)}." if told else ""


# -----------------------------------------------------------------------------
# sweeps


def table_3(evidence: Evidence) -> Table:
    """The schedule-free sweep. The paper's columns are filled where its row of the same place has our lr and wd, and a
    warm-up if ours has one: a warm-up's length depends on the run's, so the paper's stands in a column too."""
    sweep, rows = evidence.sweeps["schedule_free"], []
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


def tuning_table(evidence: Evidence) -> Table:
    """The tuning of the hand-tuned upper bound: whatever settings its rows name."""
    sweep = evidence.sweeps["hand_tuned"]
    no_settings = {"val_bpb", "seconds", "train_loss", "tokens", "tag", "flags", "error"}
    settings = list(dict.fromkeys(key for row in sweep["rows"] for key in row if key not in no_settings))
    return ["Config", *settings, "Val bpb", "Time"], [
        [config_name(i, sweep), *(str(row.get(key, "-")) for key in settings), *measured(row)]
        for i, row in enumerate(sweep["rows"])
    ]


def config_name(i: int, sweep: dict) -> str:
    return f"{i} (best)" if i == sweep["best"] else str(i)


def measured(row: dict) -> list[str]:
    """A sweep row's bpb and time; a run that took time and left no bpb has diverged."""
    diverged = row["val_bpb"] is None and row["seconds"] is not None
    return [DIVERGED if diverged else number(row["val_bpb"]), duration(row["seconds"])]


# -----------------------------------------------------------------------------
# costs, ablations


def cost_table(evidence: Evidence) -> Table:
    one, meta, n_jel = run_cost(evidence), evidence.meta_result, len(evidence.runs.get("jel", {}))
    costs = [
        ("one JEL run", f"mean of {n_jel} seeds" if n_jel else ABSENT, one["tokens"], one["seconds"], "1"),
        (
            "meta-training",
            f"{meta['updates']} updates, {meta['episodes']} episodes" if meta else ABSENT,
            meta.get("tokens"),
            meta.get("seconds"),
            "5.6",
        ),
    ]
    for method, name, paper in (("schedule_free", "schedule-free sweep", "8"), ("hand_tuned", "hand-tuning", "-")):
        rows = evidence.sweeps[method]["rows"] if method in evidence.sweeps else []
        costs.append(
            (
                name,
                f"{len(rows)} runs" if rows else ABSENT,
                total([row.get("tokens") for row in rows]),
                total([row["seconds"] for row in rows]),
                paper,
            )
        )
    header = ["Cost of", "Made of", "Tokens", "Runs by tokens", "Seconds", "Runs by seconds", "Paper: runs"]
    return header, [
        [
            name,
            parts,
            number(tokens, ",.0f"),
            number(ratio(tokens, one["tokens"]), ".2f"),
            number(seconds, ",.1f"),
            number(ratio(seconds, one["seconds"]), ".2f"),
            paper,
        ]
        for name, parts, tokens, seconds, paper in costs
    ]


def controller_table(evidence: Evidence) -> Table:
    cost = controller_cost(evidence)
    return ["The controller's cost", "Measured", "Paper"], [
        ["milliseconds a decision", number(cost["ms_per_decision"], ".3f"), "< 0.5"],
        ["percent of a run's time", number(cost["overhead_percent"], ".3f"), "< 0.3"],
    ]


def ablation_table(evidence: Evidence) -> Table:
    """JEL as it stands first, then each variant, without verdicts: an ablation does not name its seeds."""
    jel, rows = list(evidence.results("jel", "val_bpb").values()), []
    for row in [{"what": "JEL as above", "val_bpb": jel}, *evidence.ablations]:
        s = summarize([math.nan if v is None else v for v in row["val_bpb"]])
        relative = number(relative_change(s.mean, summarize(jel).mean), "+.1%") if s.n and jel else "-"
        rows.append([row["what"], number(s.mean), spread(s.std, s.n), str(s.n), relative, row.get("note", "")])
    return ["What", "Val bpb (mean)", "Std", "Runs", "Relative to JEL", "Note"], rows


# -----------------------------------------------------------------------------
# what the numbers are of


def facts(evidence: Evidence) -> tuple[Table, list[str]]:
    """What the numbers are of, and a warning for everything in which they are not comparable."""
    runs = evidence.configs()
    everything = runs + ([evidence.meta_config] if evidence.meta_config else [])
    seeds = sorted({seed for by_seed in evidence.runs.values() for seed in by_seed})
    told = {
        "Data": distinct(everything, data),
        "Model": distinct(runs, model),
        "Run": distinct(runs, length),
        "Seeds": [", ".join(map(str, seeds))] if seeds else [],
        "Policy of the JEL runs": distinct([run.config for run in evidence.runs.get("jel", {}).values()], policy),
        "Device": distinct(everything, device),
        "Versions": distinct(everything, versions),
        "Git commit": distinct(everything, lambda config: config["environment"]["commit"] or "not recorded"),
    }
    table = ["What", "These numbers"], [[what, "; ".join(values) or ABSENT] for what, values in told.items()]
    warnings = [
        f"{what} is not the same for all: {'; '.join(told[what])}. {harm} cannot be compared."
        for what, harm in {
            "Data": "The runs",
            "Model": "The runs",
            "Run": "The runs",
            "Device": "Seconds",
            "Policy of the JEL runs": "The JEL runs",
        }.items()
        if len(told[what]) > 1
    ]
    trained = evidence.meta_result and stem(evidence.meta_result["policy"])
    if trained and set(told["Policy of the JEL runs"]) - {trained}:
        warnings.append("The JEL runs used another policy than the one whose meta-training is reported here.")
    sweep = evidence.sweeps.get("schedule_free")
    if sweep and sweep["best"] is not None:
        best = sweep["rows"][sweep["best"]]
        flags = [run.config["flags"] for run in evidence.runs.get("schedule_free", {}).values()]
        if any(best[key] != f[f"sf_{key}"] for f in flags for key in ("lr", "wd", "warmup")):
            warnings.append("The schedule-free runs do not have the setting that was best in the sweep.")
    return table, warnings


def distinct(configs: Sequence[dict], describe: Callable[[dict], str]) -> list[str]:
    return list(dict.fromkeys(map(describe, configs)))


def data(config: dict) -> str:
    record = config["data"]
    counts = ", ".join(f"{record[key]:,} {key}" for key in ("files", "documents", "shards") if key in record)
    size = f"{record['bytes']:,} bytes" if "bytes" in record else f"{record['shard_bytes']:,} bytes of shards"
    return f"{record.get('source', config['flags']['data'])}: {counts}, {size}, sha256 {record['sha256'][:16]}"


def model(config: dict) -> str:
    m, parameters = config["model"], config["parameters"]
    return f"{m['n_layer']} layers, {m['n_embd']} wide, vocabulary {m['vocab_size']:,}, {parameters:,} parameters"


def scale(config: dict) -> tuple[int, int, int]:
    return config["parameters"], config["num_iterations"], config["flags"]["total_batch_size"]


def length(config: dict) -> str:
    _, steps, batch = scale(config)
    return f"{steps:,} steps x {batch:,} tokens = {steps * batch:,} tokens, context {config['model']['sequence_len']:,}"


def device(config: dict) -> str:
    e = config["environment"]
    return f"{e['device']}, {e['world_size']} rank{'s' * (e['world_size'] != 1)}, {e['threads']} CPU threads"


def versions(config: dict) -> str:
    return f"Python {config['environment']['python']}, torch {config['environment']['torch']}"


def policy(config: dict) -> str:
    chosen = config["flags"]["policy"]
    return stem(chosen) if chosen else "the one shipped with the package"


def stem(path: str) -> str:
    """A policy's path, whole, without the suffix that either of its files has."""
    return os.path.abspath(path.removesuffix(".safetensors").removesuffix(".json"))
