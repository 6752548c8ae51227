"""Synthetic runs of preset tiny for the report's tests, and helpers that read a report."""

from __future__ import annotations

import json
import math
import sys

import numpy as np

from nanochat.files import read_json
from scripts.report import __main__ as report
from scripts.report.evidence import read_evidence
from scripts.report.render import to_markdown
from scripts.report.tables import PAPER_TABLE_3
from scripts.report.text import report_blocks

BPB = {  # test bpb by seed; validation is 0.01 above
    "hand_tuned": (2.101, 2.120, 2.095, 2.110, 2.090),
    "jel": (2.220, 2.231, 2.214, 2.225, 2.210),
    "best_constant": (2.221, 2.229, 2.216, 2.222, 2.212),
    "schedule_free": (2.301, 2.322, 2.290, 2.310, 2.300),
    "suboptimal": (3.293, 3.310, 3.280, 3.300, 3.290),
}
STEPS, BATCH, SEEDS, FLOPS = 250, 2048, (1, 2, 3, 4, 5), 1e12


# -----------------------------------------------------------------------------
# synthetic runs


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def config(**flags):
    return {
        "environment": {
            "python": "3.11.7",
            "torch": "2.13.0",
            "commit": "abc1234",
            "device": "a CPU",
            "world_size": 1,
            "threads": 2,
        },
        "flags": {
            "data": "embedded",
            "total_batch_size": BATCH,
            "policy": None,
            "sf_lr": 0.3,
            "sf_wd": 0.0,
            "sf_warmup": 0,
            "matrix_lr": 1.0,
            "base_lr": 0.0464,
            **flags,
        },
        "model": {"n_layer": 4, "n_embd": 64, "vocab_size": 512, "sequence_len": 128},
        "parameters": 327_816,
        "data": {
            "source": "embedded",
            "files": 437,
            "documents": 1950,
            "bytes": 8_744_682,
            "shards": 8,
            "shard_bytes": 2_853_699,
            "sha256": "851e1656" * 8,
        },
        "num_iterations": STEPS,
    }


def write_log(folder, records):
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def add_run(folder, method, seed, bpb, finished=True, **flags):
    run = folder / f"{method}-s{seed}"
    write(run / "config.json", config(**flags))
    log = [{"step": s, "loss": 3.0} for s in range(STEPS if finished else 120)]
    log += [{"step": s, "val_bpb": bpb + (4.46 - bpb) * math.exp(-s / 30)} for s in range(0, STEPS, 25)]
    write_log(run, [*log, {"step": STEPS, "val_bpb": bpb + 0.01}])
    result = {"test_bpb": bpb, "val_bpb": bpb + 0.01, "train_loss": bpb * 1.4, "seconds": 20.0, "core_seconds": 20.0}
    result |= {"flops": 1.5 * FLOPS, "steps": STEPS, "tokens": STEPS * BATCH, "recoveries": 0}
    if method == "jel":
        result |= {"controller_seconds": 0.002, "decisions": 10}
    if finished:
        write(run / "result.json", result)


def add_meta(folder, seed, updates=30, finished=True):
    rng, progress, meta = np.random.default_rng(seed), [i / 10 for i in range(10)], folder / f"meta-s{seed}"
    write(meta / "config.json", config())
    write_log(
        meta,
        [
            {
                "step": u,
                "return_mean": 2 - 1.6 * math.exp(-u / 6) + rng.normal(0, 0.05),
                "entropy": 0.92 - 0.003 * u,
                "return_best": 2.1 + rng.normal(0, 0.05),
                "decision_progress": progress,
                "multipliers": {
                    "*": {
                        "lr": [seed * math.exp(3 * (1 - math.exp(-u / 5)) * (0.4 + 0.6 * p)) for p in progress],
                        "weight_decay": [math.exp(0.05 * u * (p - 0.4)) for p in progress],
                    }
                },
            }
            for u in range(updates)
        ],
    )
    result = {"updates": updates, "episodes": 8 * updates, "tokens": 1_536_000, "probe_tokens": 64_000}
    result |= {"flops": 6 * FLOPS, "seconds": 60.0, "core_seconds": 115.0, "policy": str(meta / "policy.safetensors")}
    if finished:
        write(meta / "result.json", result)


def sweep_row(i, bpb, flags=(), **setting):
    price = {"seconds": 18.0, "core_seconds": 18.0, "flops": FLOPS, "tokens": STEPS * BATCH, "recoveries": 0}
    return {**setting, "val_bpb": bpb, "train_loss": 3.0, **price, "tag": f"tiny/{i}", "flags": list(flags)}


def add_sweeps(folder):
    rows = [
        sweep_row(i, 2.3 + 0.1 * i, ["--sf-lr", lr, "--sf-wd", wd], lr=lr, wd=wd, warmup=warmup // 2)
        for i, (lr, wd, warmup, *_) in enumerate(PAPER_TABLE_3)
    ]
    rows[5] |= {"val_bpb": None, "flops": None, "tokens": STEPS * BATCH // 2, "error": "the run diverged"}
    write(folder / "sweep_schedule_free.json", {"rows": rows, "best": 0})
    fair = [
        sweep_row(i, 2.25 + 0.1 * i, ["--sf-lr", 0.3], lr=0.3, wd=0.0, warmup=0, muon_schedule="warmdown", matrix_lr=m)
        for i, m in enumerate((0.06, 0.02))
    ]
    write(folder / "sweep_schedule_free_fair.json", {"rows": fair, "best": 0})
    tuned = [
        sweep_row(i, 2.1 + abs(scale - 1) / 10, ["--matrix-lr", scale], lr_scale=scale, weight_decay=0.2)
        for i, scale in enumerate((0.5, 1.0, 2.0))
    ]
    write(folder / "sweep_hand_tuned.json", {"rows": tuned, "best": 1})
    constants = [
        sweep_row(i, 2.2 + i / 10, ["--base-lr", lr / 1000], lr_multiplier=lr, wd_multiplier=wd)
        for i, (lr, wd) in enumerate([(46.4, 1.0), (10.0, 1.0), (21.5, 1.0), (100.0, 1.0), (46.4, 10.0), (46.4, 0.1)])
    ]
    write(folder / "sweep_best_constant.json", {"rows": constants, "best": 0})


def add_everything(folder):
    for method, values in BPB.items():
        for seed, bpb in zip(SEEDS, values):
            policy = str(folder / f"meta-s{seed}" / "policy") if method == "jel" else None
            add_run(folder, method, seed, bpb, policy=policy)
    for seed in SEEDS:
        add_meta(folder, seed)
    add_sweeps(folder)


def section_rows(*rows):
    keys = "name", "test_bpb", "run_equivalents", "verdict", "difference", "interval"
    return [dict(zip(keys, row)) for row in rows]


def add_sections(folder):
    """What scripts.ablate writes."""
    better = "JEL is better (-0.0600 [-0.0900, -0.0300])"
    sections = {
        "ablations": section_rows(
            ("independent noise", [2.24, 2.25, 2.23, 2.24, 2.26], 6.0, better, -0.06, [-0.09, -0.03])
        ),
        "equal_budget": section_rows(
            (
                "random search over the same constants",
                [2.27, 2.30, 2.26, 2.29, 2.28],
                6.0,
                better,
                -0.06,
                [-0.09, -0.03],
            ),
            (
                "CMA-ES over the same constants",
                [2.2, 2.3, 2.2, 2.2, 2.2],
                6.0,
                "no difference shown (-0.0010 [-0.1, +0.1])",
                -0.001,
                [-0.1, 0.1],
            ),
            ("its own mean, held", [2.22, 2.23, 2.21, 2.22, 2.21], 6.0, "JEL is worse (+0.0010 [+0.0001, +0.0020])"),
        ),
        "transfer": section_rows(("twice the depth", [2.1, 2.2, 2.1, 2.2, 2.1], 6.0, "-")),
    }
    for name, rows in sections.items():
        write(folder / "evidence" / f"{name}.json", rows)


# -----------------------------------------------------------------------------
# reading a report


def text_of(folder):
    """report.md without its figures."""
    return to_markdown(report_blocks(read_evidence(folder.parent, folder.name), set()))


def first_paragraph(text):
    return text.split("\n\n")[1]


def row(text, first):
    """The cells of the one table row that begins with `first`."""
    found = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    assert len(found) == 1, found
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def section(text, heading):
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def change(path, **values):
    write(path, read_json(path) | values)


def make_report(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["report", "--preset", "tiny", *flags])
    report.main()
    return report.base_dir() / "report"
