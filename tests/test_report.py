"""Reports made of synthetic runs: the numbers are chosen, what the report says of them must follow."""

from __future__ import annotations

import json
import math
import statistics
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from nanochat.common import UserError, run_main
from nanochat.files import read_json
from scripts.report import __main__ as report
from scripts.report.evidence import LABELS, read_evidence
from scripts.report.tables import ABSENT, PAPER_TABLE_1, PAPER_TABLE_3

BPB = {
    "jel": (2.220, 2.231, 2.214),
    "schedule_free": (2.301, 2.322, 2.290),
    "hand_tuned": (2.101, 2.120, 2.095),
    "suboptimal": (3.293, 3.310, 3.280),
}
STEPS, BATCH, SEEDS = 250, 2048, (1, 2, 3)


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
            "sf_lr": 0.5,
            "sf_wd": 0.0,
            "sf_warmup": 0,
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


def add_run(folder, method, seed, bpb, policy=None, finished=True):
    run = folder / f"{method}-s{seed}"
    write(run / "config.json", config(policy=policy))
    log = [{"step": s, "loss": 3.0} for s in range(STEPS if finished else 120)]
    log += [{"step": s, "val_bpb": bpb + (4.46 - bpb) * math.exp(-s / 30)} for s in range(0, STEPS, 25)]
    write_log(run, [*log, {"step": STEPS, "val_bpb": bpb}])
    result = {"val_bpb": bpb, "train_loss": bpb * 1.4, "seconds": 20.0, "steps": STEPS, "tokens": STEPS * BATCH}
    if method == "jel":
        result |= {"controller_seconds": 0.002, "decisions": 10}
    if finished:
        write(run / "result.json", result)


def add_meta(folder, updates=30, finished=True):
    rng, progress = np.random.default_rng(0), [i / 10 for i in range(10)]
    write(folder / "meta" / "config.json", config())
    write_log(
        folder / "meta",
        [
            {
                "step": u,
                "return_mean": 2 - 1.6 * math.exp(-u / 6) + rng.normal(0, 0.05),
                "entropy": 0.92 - 0.003 * u,
                "return_best": 2.1 + rng.normal(0, 0.05),
                "decision_progress": progress,
                "lr": [math.exp(3.4 * (1 - math.exp(-u / 5)) * (0.4 + 0.6 * p)) for p in progress],
                "weight_decay": [math.exp(0.05 * u * (p - 0.4)) for p in progress],
            }
            for u in range(updates)
        ],
    )
    if finished:
        write(
            folder / "meta" / "result.json",
            {
                "updates": updates,
                "episodes": 8 * updates,
                "tokens": 1_536_000,
                "seconds": 90.0,
                "policy": "/runs/tiny/meta/policy.safetensors",
            },
        )


def add_sweeps(folder):
    rows = [
        {
            "lr": lr,
            "wd": wd,
            "warmup": warmup // 2,
            "val_bpb": 2.3 + 0.1 * i,
            "seconds": 18.0,
            "tag": f"sf{i}",
            "tokens": STEPS * BATCH,
        }
        for i, (lr, wd, warmup, *_) in enumerate(PAPER_TABLE_3)
    ]
    rows[5]["val_bpb"] = None
    write(folder / "sweep_schedule_free.json", {"rows": rows, "best": 0})
    tuned = [
        {"lr_scale": s, "weight_decay": 0.2, "val_bpb": 2.1 + abs(s - 1) / 10, "seconds": 19.5, "tag": f"tiny/t{s}"}
        for s in (0.5, 1.0, 2.0)
    ]
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


def text_of(folder):
    """report.md without its figures."""
    return report.report_text(read_evidence(folder.parent, folder.name), set())


def row(text, first):
    """The cells of the one table row that begins with `first`."""
    found = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    assert len(found) == 1, found
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def section(text, heading):
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def change(path, **values):
    write(path, read_json(path) | values)


# -----------------------------------------------------------------------------
# a whole report


def test_a_whole_report(runs, monkeypatch, capsys):
    folder = make_report(monkeypatch)
    text = (folder / "report.md").read_text()
    names = {"figure_2_validation", "figure_3_multipliers", "figure_meta_training"}
    files = {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert {p.name for p in folder.iterdir()} == {"report.md", "results.json", *files}
    assert all(f"({name}.png)" in text for name in names) and "Not measured" not in text and "Warning" not in text
    table, jel = section(text, "Table 1: four methods"), BPB["jel"]
    assert row(table.split("JEL against")[0], "JEL") == [
        "JEL",
        f"{statistics.mean(jel):.4f}",
        f"{statistics.stdev(jel):.4f}",
        "3",
        f"{1.4 * statistics.mean(jel):.4f}",
        "meta-training = 3.0 runs by tokens",
        "1.173",
        "3.810",
    ]
    against = table.split("JEL against")[1]
    assert row(against, "Schedule-free")[1] == row(against, "Suboptimal")[1] == "better"
    assert row(against, "Hand-tuned")[1] == "worse"
    assert [row(against, m)[-1] for m in ("Schedule-free", "Hand-tuned", "Suboptimal")] == ["-2.5%", "+8.4%", "-19.3%"]
    assert "embedded: 437 files, 1,950 documents, 8 shards, 8,744,682 bytes, sha256 851e1656851e1656" in text
    assert "not at the paper's scale" in text and "abc1234" in row(text, "Git commit")
    assert "3.6% below Schedule-free (better), 5.5% above Hand-tuned (worse), 32.6% below Suboptimal (better)." in text
    assert f"{statistics.mean(jel):.4f}" in capsys.readouterr().out
    for name in names:
        svg = (folder / f"{name}.svg").read_text()
        assert ET.fromstring(svg).tag.endswith("svg") and "<dc:date>" not in svg
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    make_report(monkeypatch)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before  # equal runs, equal report

    monkeypatch.setattr(report, "draw", lambda evidence, folder: {"figure_2_validation"})
    make_report(monkeypatch)  # a figure that can no longer be drawn does not stay behind
    assert {p.stem for p in folder.iterdir()} == {"figure_2_validation", "report", "results"}
    assert "figure_3" not in (folder / "report.md").read_text()


def test_results_record_keeps_its_contract(runs):
    record = report.results_record(read_evidence(runs.parent, "tiny"))
    assert list(record) == ["preset", "methods", "schedule_free_sweep", "meta", "controller"]
    assert record["methods"]["jel"] == {
        "val_bpb": list(BPB["jel"]),
        "train_loss": [1.4 * v for v in BPB["jel"]],
        "seconds": [20.0] * 3,
    }
    assert list(record["methods"]) == ["schedule_free", "jel", "hand_tuned", "suboptimal"]
    assert record["schedule_free_sweep"][5] == {"lr": 2.0, "wd": 0.01, "warmup": 0, "val_bpb": None, "seconds": 18.0}
    assert (record["meta"]["updates"], record["meta"]["episodes"], len(record["meta"]["entropy"])) == (30, 240, 30)
    assert record["meta"]["run_equivalents"] == {"tokens": 3.0, "seconds": 4.5}
    assert record["controller"] == {"ms_per_decision": pytest.approx(0.2), "overhead_percent": pytest.approx(0.01)}
    json.dumps(record, allow_nan=False)


def test_sweeps_and_costs(runs):
    sweep = read_json(runs / "sweep_schedule_free.json")
    sweep["rows"][4]["lr"] = 3.0  # a setting the paper has not run
    write(runs / "sweep_schedule_free.json", sweep)
    write(runs / "t1.0" / "result.json", {"tokens": 7})  # tells the tokens of one row of three
    text = text_of(runs)
    table = section(text, "Table 3: the schedule-free sweep")
    assert row(table, "0 (best)")[4:] == ["2.3000", "18.0s", "0", "1.456", "9.10"]
    assert row(table, "5")[4] == "diverged" and row(table, "4")[6:] == ["-", "-", "-"]
    assert row(table, "7")[3:] == ["150", "3.0000", "18.0s", "300", "1.429", "9.07"]
    tuning = section(text, "Tuning of the hand-tuned upper bound")
    assert row(tuning, "1 (best)")[1:] == ["1.0", "0.2", "2.1000", "19.5s"]
    costs = section(text, "Costs")
    assert row(costs, "meta-training")[1:] == ["30 updates, 240 episodes", "1,536,000", "3.00", "90.0", "4.50", "5.6"]
    assert row(costs, "schedule-free sweep")[3:] == ["8.00", "144.0", "7.20", "8"]
    assert row(costs, "hand-tuning")[2:] == [ABSENT, ABSENT, "58.5", "2.92", "-"]
    for s in (0.5, 2.0):
        write(runs / f"t{s}" / "result.json", {"tokens": 7})
    assert row(section(text_of(runs), "Costs"), "hand-tuning")[2] == "21"


def test_a_paper_figure_never_stands_for_a_measured_one(runs):
    for path in [*runs.glob("*-s?/result.json"), *runs.glob("sweep*"), runs / "meta" / "result.json"]:
        if "jel-s1" not in str(path):
            path.unlink()
    text = text_of(runs)
    table, against = section(text, "Table 1: four methods").split("JEL against")
    for method, label in LABELS.items() - {("jel", "JEL")}:
        bpb, loss = PAPER_TABLE_1[method]
        assert row(table, label)[1:5] == [ABSENT, ABSENT, "0", ABSENT]
        assert row(table, label)[6:] == [f"{bpb:.3f}", f"{loss:.3f}"]
        assert row(against, label)[1:6] == [ABSENT, ABSENT, ABSENT, "0", ABSENT]
    assert row(section(text, "Costs"), "meta-training")[1:6] == [ABSENT] * 5
    for gap in (
        "bash speedrun.sh --preset tiny",
        "jel-s2: unfinished, 250 steps done",
        "Hand-tuned: no finished run",
        "scripts.sweep",
        "unfinished, 30 updates done",
    ):
        assert gap in section(text, "Not measured")


def test_seeds_that_are_too_few_or_diverged_show_nothing(runs):
    (runs / "hand_tuned-s3" / "result.json").unlink()
    change(runs / "suboptimal-s2" / "result.json", val_bpb=math.nan)
    table, against = text_of(runs).split("JEL against")
    assert row(against, "Hand-tuned")[1] == "too few seeds" and row(against, "Hand-tuned")[4] == "2"
    assert row(table, "Suboptimal")[1] == row(against, "Suboptimal")[1] == "diverged"
    assert report.results_record(read_evidence(runs.parent, "tiny"))["methods"]["suboptimal"]["val_bpb"][1] is None


def test_further_methods_add_rows_and_keys(runs):
    for seed in SEEDS:
        add_run(runs, "cosine", seed, 2.15)
    text = text_of(runs)
    table, against = text.split("JEL against")
    assert row(table, "cosine")[1:] == ["2.1500", "0.0000", "3", "3.0100", "not recorded", "-", "-"]
    assert row(against, "cosine")[1] == "worse"
    assert "cosine" in report.results_record(read_evidence(runs.parent, "tiny"))["methods"]


def test_what_cannot_be_compared_is_warned_of(runs):
    other = config(policy="elsewhere/policy.json", sf_lr=9)
    change(runs / "jel-s2" / "config.json", flags=other["flags"], num_iterations=300)
    change(runs / "schedule_free-s1" / "config.json", flags=other["flags"], data=other["data"] | {"sha256": "f" * 64})
    change(runs / "meta" / "config.json", environment=other["environment"] | {"device": "a GPU"})
    warnings = [line for line in text_of(runs).splitlines() if line.startswith("**Warning:**")]
    for word in (
        "Data is not",
        "Run is not",
        "Device is not",
        "Policy of the JEL runs is not",
        "another policy",
        "best in the sweep",
    ):
        assert sum(word in line for line in warnings) == 1, word
    assert len(warnings) == 6


def test_scale_is_that_of_the_runs_not_of_the_preset(runs):
    paper = runs.rename(runs.parent / "paper")
    assert "not at the paper's scale" in text_of(paper)
    for path in paper.glob("*-s?/config.json"):
        flags = read_json(path)["flags"] | {"total_batch_size": 524_288}
        change(path, parameters=73_531_692, num_iterations=561, flags=flags)
    assert "at the paper's scale" in text_of(paper) and "not at the paper's scale" not in text_of(paper)


def test_ablations_are_reported_when_there_are_any(runs):
    assert "Ablations" not in text_of(runs)
    grpo = {"what": "standard GRPO", "val_bpb": [2.4, 2.5], "note": "entropy | falls"}
    write(runs / "ablations.json", [grpo, {"what": "4D actions", "val_bpb": [None]}])
    table = section(text_of(runs), "Ablations and negative results")
    assert r"| standard GRPO | 2.4500 | 0.0707 | 2 | +10.3% | entropy \| falls |" in table
    assert row(table, "4D actions")[1] == "diverged" and row(table, "JEL as above")[4] == "+0.0%"


# -----------------------------------------------------------------------------
# bad input


def test_print_table_writes_nothing(runs, monkeypatch, capsys):
    assert not make_report(monkeypatch, "--print-table").exists()
    assert "Schedule-free" in capsys.readouterr().out


def test_nothing_at_all_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        run_main(lambda: make_report(monkeypatch))
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "no runs of preset tiny; run `bash speedrun.sh --preset tiny`" in error[0]
    add_run(tmp_path / "runs" / "tiny", "jel", 1, 2.2, finished=False)
    assert "jel-s1: unfinished, 120 steps done" in text_of(tmp_path / "runs" / "tiny")


@pytest.mark.parametrize(
    "name, content",
    [
        ("jel-s1/result.json", "{"),
        ("jel-s1/result.json", '{"val_bpb": 1}'),
        ("jel-s1/config.json", "[]"),
        ("meta/result.json", "{}"),
        ("sweep_schedule_free.json", '{"rows": {}, "best": 0}'),
        ("sweep_hand_tuned.json", '{"rows": [3], "best": 0}'),
        ("ablations.json", "{}"),
    ],
)
def test_damaged_files_are_named(runs, name, content):
    (runs / name).write_text(content)
    with pytest.raises(UserError, match=name) as e:
        text_of(runs)
    assert "\n" not in str(e.value)


def test_a_full_disk_leaves_the_former_report(runs, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    folder = runs.parents[1] / "report"
    write(folder / "report.md", "former")
    monkeypatch.setattr(report, "write_json", full)
    monkeypatch.setattr(report, "draw", lambda evidence, folder: set())
    with pytest.raises(UserError, match="No space left"):
        make_report(monkeypatch)
    assert [p.name for p in folder.iterdir()] == ["report.md"] and read_json(folder / "report.md") == "former"
    assert {p.name for p in folder.parent.iterdir()} == {"runs", "report"}
