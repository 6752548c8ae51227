"""The report: its statistics against slow twins, its verdicts' properties, and reports made of synthetic run folders.

The synthetic numbers are chosen; what the report says of them must follow.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from nanochat.common import UserError
from scripts import report
from scripts.report_statistics import compare, mean_curve, quartiles, ratio, summarize, total, verdict
from scripts.report_tables import ABSENT, PAPER_TABLE_1, PAPER_TABLE_3, Evidence, markdown, number, plain

BPB = {"jel": (2.220, 2.231, 2.214), "schedule_free": (2.301, 2.322, 2.290), "hand_tuned": (2.101, 2.120, 2.095),
       "suboptimal": (3.293, 3.310, 3.280)}
STEPS, BATCH, SEEDS = 250, 2048, (1, 2, 3)


def read(path):
    return json.loads(path.read_text())


# -----------------------------------------------------------------------------
# synthetic runs

def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def config(**flags):
    return {"environment": {"python": "3.11.7", "torch": "2.13.0", "commit": "abc1234", "device": "a CPU", "world_size": 1, "threads": 2},
            "flags": {"data": "embedded", "total_batch_size": BATCH, "policy": None, "sf_lr": 0.5, "sf_wd": 0.0, "sf_warmup": 0, **flags},
            "model": {"n_layer": 4, "n_embd": 64, "vocab_size": 512, "sequence_len": 128}, "parameters": 327_816,
            "data": {"source": "embedded", "files": 437, "documents": 1950, "bytes": 8_744_682, "sha256": "851e1656" * 8,
                     "shards": 8, "shard_bytes": 2_853_699}, "num_iterations": STEPS}


def add_run(folder, method, seed, bpb, policy=None, finished=True):
    run = folder / f"{method}-s{seed}"
    write(run / "config.json", config(policy=policy))
    curve = lambda step: bpb + (4.46 - bpb) * math.exp(-step / 30)
    log = [{"step": s, "val_bpb": curve(s)} for s in range(0, STEPS, 25)] + [{"step": s, "loss": 3.0} for s in range(STEPS)]
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*log, {"step": STEPS, "val_bpb": bpb}]))
    extra = {"controller_seconds": 0.002, "decisions": 10} if method == "jel" else {}
    if finished:
        write(run / "result.json", {"val_bpb": bpb, "train_loss": bpb * 1.4, "seconds": 20.0, "steps": STEPS, "tokens": STEPS * BATCH, **extra})


def add_meta(folder, updates=30, finished=True):
    rng, k = np.random.default_rng(0), 10
    write(folder / "meta" / "config.json", config(updates=30))
    progress = [i / k for i in range(k)]
    records = [{"step": u, "return_mean": 0.4 + 1.6 * (1 - math.exp(-u / 6)) + rng.normal(0, 0.05), "return_best": 2.1 + rng.normal(0, 0.05),
                "entropy": 0.92 - 0.003 * u, "decision_progress": progress,
                "lr": [math.exp(3.4 * (1 - math.exp(-u / 5)) * (0.4 + 0.6 * p)) for p in progress],
                "weight_decay": [math.exp(0.05 * u * (p - 0.4)) for p in progress], "seconds": 3.0} for u in range(updates)]
    (folder / "meta" / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if finished:
        write(folder / "meta" / "result.json", {"updates": updates, "episodes": 8 * updates, "tokens": 1_536_000, "seconds": 90.0,
                                                "policy": "/runs/tiny/meta/policy.safetensors"})


def add_sweeps(folder):
    rows = [{"lr": lr, "wd": wd, "warmup": warmup // 2, "val_bpb": 2.3 + 0.1 * i, "train_loss": 3.2, "seconds": 18.0,
             "tokens": STEPS * BATCH, "tag": f"sf{i}"} for i, (lr, wd, warmup, *_) in enumerate(PAPER_TABLE_3)]
    rows[5]["val_bpb"] = None
    write(folder / "sweep_schedule_free.json", {"rows": rows, "best": 0})
    tuned = [{"lr_scale": s, "weight_decay": 0.2, "val_bpb": 2.1 + abs(s - 1) / 10, "seconds": 19.5} for s in (0.5, 1.0, 2.0)]
    write(folder / "sweep_hand_tuned.json", {"rows": tuned, "best": 1})


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folder of preset tiny, with everything measured."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = tmp_path / "runs" / "tiny"
    for method, values in BPB.items():
        for seed, bpb in zip(SEEDS, values):
            add_run(folder, method, seed, bpb, policy="/runs/tiny/meta/policy" if method == "jel" else None)
    add_meta(folder)
    add_sweeps(folder)
    return folder


def make_report(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["report", "--preset", "tiny", *flags])
    report.main()
    return report.base_dir() / "report"


def cells(text, first):
    """The cells of the one table row that starts with `first`."""
    found = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    assert len(found) == 1, found
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def section(text, heading):
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


# -----------------------------------------------------------------------------
# statistics

values = st.floats(0.5, 5)
by_seed = st.dictionaries(st.integers(0, 6), values, min_size=2, max_size=7)


@given(st.lists(values, min_size=2, max_size=8))
def test_summary_is_that_of_the_statistics_module(x):
    s = summarize(x)
    assert s.n == len(x)
    assert s.mean == pytest.approx(statistics.mean(x)) and s.std == pytest.approx(statistics.stdev(x), abs=1e-12)


@given(by_seed, by_seed)
def test_comparison_against_its_slow_twin(ours, theirs):
    c = compare(ours, theirs)
    pairs = [(ours[s], theirs[s]) for s in range(7) if s in ours and s in theirs]
    assert c.n == len(pairs)
    if len(pairs) >= 2:
        differences = [a - b for a, b in pairs]
        assert c.difference == pytest.approx(statistics.mean(differences), abs=1e-12)
        assert c.standard_error == pytest.approx(statistics.stdev(differences) / len(pairs) ** 0.5, abs=1e-12)
        assert c.relative == pytest.approx(statistics.mean(a for a, _ in pairs) / statistics.mean(b for _, b in pairs) - 1)


@given(by_seed, by_seed)
def test_swapping_the_methods_swaps_the_verdict(ours, theirs):
    swapped = {"better": "worse", "worse": "better"}
    a, b = compare(ours, theirs), compare(theirs, ours)
    assert b.verdict == swapped.get(a.verdict, a.verdict)
    assert a.n == 0 or b.difference == -a.difference


@given(by_seed)
def test_a_method_does_not_differ_from_itself(x):
    assert compare(x, x).verdict == ("no difference shown" if len(x) >= 3 else "too few seeds")


def test_verdict_needs_seeds_and_more_than_two_standard_errors():
    assert verdict(-0.2, 0.1, 3) == "no difference shown" and verdict(-0.2001, 0.1, 3) == "better"
    assert verdict(0.2001, 0.1, 3) == "worse" and verdict(-9.0, 0.1, 2) == "too few seeds"
    assert verdict(None, None, 0) == ABSENT and verdict(math.nan, math.nan, 3) == "diverged"


def test_pairing_removes_what_the_seeds_share():
    base = {s: 1.0 + s for s in range(4)}  # seeds differ by far more than the methods do
    assert compare({s: v - 0.01 - 0.001 * (s % 2) for s, v in base.items()}, base).verdict == "better"


def test_paper_figures_give_the_papers_percentages():
    jel = PAPER_TABLE_1["jel"][0]
    relative = {m: round(100 * (jel / bpb - 1), 1) for m, (bpb, _) in PAPER_TABLE_1.items()}
    assert relative == {"schedule_free": -2.5, "jel": 0, "hand_tuned": 8.4, "suboptimal": -19.3}
    assert min(row[3] for row in PAPER_TABLE_3) == PAPER_TABLE_1["schedule_free"][0]


def test_bands():
    steps, mean, low, high = mean_curve([{0: 3.0, 5: 2.0, 9: 1.0}, {0: 5.0, 9: 3.0}])
    assert (steps, mean.tolist(), low.tolist(), high.tolist()) == ([0, 9], [4.0, 2.0], [3.0, 1.0], [5.0, 3.0])
    x = np.random.default_rng(0).random((9, 2))
    want = [[statistics.quantiles(column, n=4, method="inclusive")[i] for column in x.T] for i in range(3)]
    np.testing.assert_allclose(quartiles(x), want)


def test_ratio_and_total_of_what_was_not_measured():
    assert ratio(None, 2.0) is ratio(2.0, None) is ratio(2.0, 0) is total([]) is total([1.0, None]) is None
    assert ratio(3.0, 2.0) == 1.5 and total([1, 2]) == 3


@settings(max_examples=30)
@given(st.lists(st.lists(st.text("ab|\n", max_size=4), min_size=3, max_size=3), max_size=4))
def test_tables_keep_their_shape(rows):
    lines = markdown((["one", "two", "three"], rows)).splitlines()
    assert len(lines) == 2 + len(rows) and all(line.replace(r"\|", "").count("|") == 4 for line in lines)
    flat = [[cell.replace("\n", "") for cell in row] for row in rows]
    assert len(plain((["one", "two", "three"], flat)).splitlines()) == 2 + len(rows)


def test_numbers():
    assert (number(None), number(math.nan), number(math.inf), number(1.23456)) == (ABSENT, "diverged", "diverged", "1.2346")


# -----------------------------------------------------------------------------
# a whole report
