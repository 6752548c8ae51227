"""Reports made of synthetic runs: the numbers are chosen, what the report says of them must follow."""

from __future__ import annotations

import base64
import json
import math
import statistics
import xml.etree.ElementTree as ET

import pytest

from nanochat.common import UserError, run_main
from nanochat.files import read_json
from scripts.report import __main__ as report
from scripts.report import figures
from scripts.report.costs import EXPLORATORY_RUNS
from scripts.report.evidence import LABELS, read_evidence
from scripts.report.tables import ABSENT, PAPER_TABLE_1
from scripts.report.text import SECTION_TITLES
from tests.report_runs import (
    BPB,
    SEEDS,
    add_run,
    add_sections,
    change,
    config,
    first_paragraph,
    make_report,
    row,
    section,
    text_of,
    write,
)

# -----------------------------------------------------------------------------
# a whole report


def test_a_whole_report(runs, monkeypatch, capsys):
    folder = make_report(monkeypatch)
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    names = {"figure_1_price", "figure_2_validation", "figure_3_multipliers", "figure_meta_training"}
    files = {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    assert {p.name for p in folder.iterdir()} == {"report.md", "report.html", "results.json", *files}
    assert all(f"({name}.png)" in text for name in names)
    assert "## Not measured" not in text and "Warning" not in text
    table, jel = section(text, "Table 1: the methods"), BPB["jel"]
    mean, std = statistics.mean(jel), statistics.stdev(jel)
    assert row(table, "JEL") == [
        "JEL",
        f"{mean:.4f} ± {std:.4f} (5)",
        "0",
        "-",
        "-",
        "-",
        "1.50",
        f"{6 + EXPLORATORY_RUNS['jel']:.1f} = 6.0 meta-training + {EXPLORATORY_RUNS['jel']} exploratory",
    ]
    differences = [a - b for a, b in zip(jel, BPB["schedule_free"])]
    middle = statistics.mean(differences)
    half = 2.776445 * statistics.stdev(differences) / 5**0.5
    assert row(table, "Schedule-free")[2:] == [
        "0",
        f"{middle:+.4f}",
        f"[{middle - half:+.4f}, {middle + half:+.4f}]",
        "better",
        "1.50",
        "9.5 = 7.5 sweep schedule-free + 2.0 sweep schedule-free-fair",
    ]
    assert [row(table, name)[5] for name in ("Hand-tuned", "Best constant", "Suboptimal")] == [
        "worse",
        "no difference shown",
        "better",
    ]
    assert row(table, "Hand-tuned")[7] == "40.0 = 3.0 sweep hand-tuned + 37 exploratory"
    assert row(table, "Best constant")[7] == "6.0 = 6.0 sweep best-constant" and row(table, "Suboptimal")[7] == "0"
    again = section(text, "The same runs, as the paper shows them")
    assert row(again, "JEL")[1:] == [
        f"{mean + 0.01:.4f} ± {std:.4f} (5)",
        f"{1.4 * mean:.4f} ± {1.4 * std:.4f} (5)",
        "-",
        "1.173",
        "3.810",
        "-",
    ]
    assert [row(again, m)[-1] for m in ("Schedule-free", "Hand-tuned", "Suboptimal")] == ["-2.5%", "+8.4%", "-19.3%"]
    assert "embedded: 437 files, 1,950 documents, 8 shards, 8,744,682 bytes, sha256 851e1656851e1656" in text
    assert "not at the paper's scale" in text and "abc1234" in row(text, "Git commit")
    assert row(text, "Policies of the JEL runs")[1] == "one per seed, learned by the meta-training of that seed"
    assert f"{mean:.4f}" in capsys.readouterr().out
    for name in names:
        svg = (folder / f"{name}.svg").read_text()
        assert ET.fromstring(svg).tag.endswith("svg") and "<dc:date>" not in svg
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert base64.b64encode(svg.encode()).decode() in page

    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    make_report(monkeypatch)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before  # equal runs, equal report

    draw = report.draw
    monkeypatch.setattr(report, "draw", lambda *args: draw(*args) & {"figure_2_validation"})
    for path in folder.glob("figure_[13m]*"):
        path.write_text("a former report's")
    monkeypatch.setattr(figures, "save_figure", only_the_first(figures.save_figure))
    make_report(monkeypatch)  # a figure that can no longer be drawn does not stay behind
    assert {p.stem for p in folder.iterdir()} == {"figure_2_validation", "report", "results"}
    assert "figure_3" not in (folder / "report.md").read_text()


def only_the_first(save):
    return lambda figure, folder, name: save(figure, folder, name) if name == "figure_2_validation" else None


@pytest.mark.parametrize(
    "shift, seeds, words",
    [
        ((-0.02, -0.021, -0.019, -0.02, -0.02), 5, "**JEL beats the best constant (-0.0200 bpb, 95% interval [-0.02"),
        ((0.02, 0.021, 0.019, 0.02, 0.02), 5, "**JEL does worse than the best constant (+0.0200 bpb, 95% interval [+0"),
        ((0.01, -0.01, 0.02, -0.02, 0), 5, "**JEL does not beat the best constant: no difference is shown (+0.0000"),
        ((-0.02, -0.021, -0.019, 0, 0), 3, "**Whether JEL beats the best constant is undecided with 3 of the 5 seeds"),
        ((0, 0, 0, 0, 0), 0, "**Whether JEL beats the best constant was not measured.**"),
        ((math.nan, 0, 0, 0, 0), 5, "**JEL cannot be compared with the best constant: a run diverged.**"),
    ],
)
def test_the_first_paragraph_says_whether_jel_beats_the_best_constant(runs, shift, seeds, words):
    for seed, jel, difference in zip(SEEDS, BPB["jel"], shift):
        result = runs / f"best_constant-s{seed}" / "result.json"
        change(result, test_bpb=jel - difference)
        if seed > seeds:
            result.unlink()
    paragraph = first_paragraph(text_of(runs))
    assert paragraph.startswith(f"JEL ends at {statistics.mean(BPB['jel']):.4f} ± ") and words in paragraph
    assert "JEL does worse than the hand-tuned rates (+" in paragraph and "JEL beats schedule-free (-" in paragraph


def test_results_record_keeps_its_contract(runs):
    record = report.results_record(read_evidence(runs.parent, "tiny"))
    assert list(record) == [
        "preset",
        "methods",
        "schedule_free_sweep",
        "meta",
        "controller",
        "ablations",
        "equal_budget",
        "transfer",
    ]
    assert record["methods"]["jel"] == {
        "test_bpb": list(BPB["jel"]),
        "val_bpb": [v + 0.01 for v in BPB["jel"]],
        "train_loss": [1.4 * v for v in BPB["jel"]],
        "seconds": [20.0] * 5,
        "recoveries": [0] * 5,
    }
    assert list(record["methods"]) == ["hand_tuned", "jel", "best_constant", "schedule_free", "suboptimal"]
    bad = record["schedule_free_sweep"][5]
    assert (bad["lr"], bad["wd"], bad["warmup"], bad["val_bpb"], bad["seconds"]) == (2.0, 0.01, 0, None, 18.0)
    assert [row["sweep"] for row in record["schedule_free_sweep"]] == ["schedule-free"] * 8 + ["schedule-free-fair"] * 2
    assert record["schedule_free_sweep"][8]["muon_schedule"] == "warmdown"
    meta = record["meta"]
    assert (meta["updates"], meta["episodes"], len(meta["entropy"]), meta["run_equivalents"]) == (30, 240, 30, 6.0)
    assert record["controller"] == {"ms_per_decision": pytest.approx(0.2), "overhead_percent": pytest.approx(0.01)}
    assert record["ablations"] == record["equal_budget"] == record["transfer"] == []
    json.dumps(record, allow_nan=False)


def test_without_meta_training_the_record_is_empty_there(runs):
    for seed in SEEDS:
        (runs / f"meta-s{seed}" / "config.json").unlink()
    evidence = read_evidence(runs.parent, "tiny")
    meta = {"updates": None, "episodes": None, "entropy": [], "return_mean": [], "run_equivalents": None}
    assert report.results_record(evidence)["meta"] == meta
    assert row(section(text_of(runs), "Table 1: the methods"), "JEL")[7] == ABSENT


def test_sweeps_and_costs(runs):
    sweep = read_json(runs / "sweep_schedule_free.json")
    sweep["rows"][4]["lr"] = 3.0  # a setting the paper has not run
    sweep["rows"][6]["recoveries"] = 1
    write(runs / "sweep_schedule_free.json", sweep)
    text = text_of(runs)
    table = section(text, "Table 3: the schedule-free sweep")
    assert row(table, "0 (best)")[4:] == ["2.3000", "18.0s", "0", "1.456", "9.10"]
    assert row(table, "5")[4] == "diverged" and row(table, "4")[6:] == ["-", "-", "-"]
    assert row(table, "6")[4] == "2.9000 (recovered)"
    assert row(table, "7")[3:] == ["150", "3.0000", "18.0s", "300", "1.429", "9.07"]
    fair = section(text, "Schedule-free with a fair share of tuning")
    assert row(fair, "0 (best)")[1:] == ["0.3", "0.0", "0", "warmdown", "0.06", "2.2500", "18.0s"]
    best = "best by validation of 10 settings: the paper's 8 (best 2.3000 bpb of the validation split) and 2 more"
    assert best in fair and "(best 2.2500)" in fair and best in section(text, "Table 1: the methods")
    assert row(section(text, "Tuning of the hand-tuned upper bound"), "1 (best)")[1:] == [
        "1.0",
        "0.2",
        "2.1000",
        "18.0s",
    ]
    assert row(section(text, "The best constant"), "0 (best)")[1:] == ["46.4", "1.0", "2.2000", "18.0s"]
    costs = section(text, "Costs")
    assert row(costs, "one run, the unit")[1:] == ["median setting", "1.00", "18.0"]
    assert row(costs, "a run of JEL")[1:] == ["mean of 5 seeds", "1.50", "20.0"]
    assert row(costs, "meta-training of one policy")[1:] == [
        "30 updates, 240 episodes; mean of 5 seeds",
        "6.00",
        "115.0",
    ]
    assert row(costs, "sweep schedule-free")[1:] == ["8 settings", "7.50", "144.0"]  # one diverged half way
    assert row(costs, "sweep hand-tuned")[1:] == ["3 settings", "3.00", "54.0"]


def test_recovered_runs_are_marked(runs):
    change(runs / "jel-s2" / "result.json", recoveries=2)
    text = text_of(runs)
    assert row(section(text, "Table 1: the methods"), "JEL")[2] == "2 (s2: 2)"
    assert "Recovered from a divergence, and marked in Table 1: jel-s2 (2)." in text
    record = report.results_record(read_evidence(runs.parent, "tiny"))
    assert record["methods"]["jel"]["recoveries"] == [0, 2, 0, 0, 0]


def test_a_paper_figure_never_stands_for_a_measured_one(runs):
    for path in [*runs.glob("*-s?/result.json"), *runs.glob("sweep*")]:
        if "jel-s1" not in str(path):
            path.unlink()
    text = text_of(runs)
    table, again = section(text, "Table 1: the methods"), section(text, "The same runs, as the paper shows them")
    for method in LABELS.keys() - {"jel"}:
        assert row(table, LABELS[method])[1:7] == [ABSENT, ABSENT, ABSENT, "-", ABSENT, ABSENT]
        assert row(again, LABELS[method])[1:4] == [ABSENT] * 3
        paper = [f"{value:.3f}" for value in PAPER_TABLE_1.get(method, ())] or ["-", "-"]
        assert row(again, LABELS[method])[4:6] == paper
    assert row(section(text, "Costs"), "meta-training of one policy")[1:] == [ABSENT] * 3
    for gap in (
        "bash speedrun.sh --preset tiny",
        "jel-s2: unfinished, 250 steps done",
        "Hand-tuned: no finished run",
        "scripts.sweep --what best-constant",
        "meta-training with seed 3: unfinished, 30 updates done",
    ):
        assert gap in section(text, "Not measured")


def test_seeds_that_are_too_few_or_diverged_show_nothing(runs):
    (runs / "hand_tuned-s3" / "result.json").unlink()
    change(runs / "suboptimal-s2" / "result.json", test_bpb=math.nan)
    text = text_of(runs)
    table = section(text, "Table 1: the methods")
    assert row(table, "Hand-tuned")[5] == "undecided, n = 4" and row(table, "Hand-tuned")[1].endswith("(4)")
    assert row(table, "Suboptimal")[1] == row(table, "Suboptimal")[5] == "diverged"
    assert report.results_record(read_evidence(runs.parent, "tiny"))["methods"]["suboptimal"]["test_bpb"][1] is None


def test_further_methods_add_rows_and_keys(runs):
    for seed in SEEDS:
        add_run(runs, "cosine", seed, 2.15)
    table = section(text_of(runs), "Table 1: the methods")
    assert row(table, "cosine")[1:3] == ["2.1500 ± 0.0000 (5)", "0"]
    assert row(table, "cosine")[5:] == ["worse", "1.50", "not recorded"]
    assert "cosine" in report.results_record(read_evidence(runs.parent, "tiny"))["methods"]


def test_a_run_that_did_not_read_the_test_split_is_not_in_table_1(runs):
    change(runs / "jel-s1" / "result.json", test_bpb=None)
    text = text_of(runs)
    assert row(section(text, "Table 1: the methods"), "JEL")[1].endswith("(4)")
    assert row(section(text, "The same runs, as the paper shows them"), "JEL")[1].endswith("(5)")


def test_what_cannot_be_compared_is_warned_of(runs):
    other = config(policy="elsewhere/policy.json", sf_lr=9)
    change(runs / "jel-s2" / "config.json", flags=other["flags"], num_iterations=300)
    change(runs / "schedule_free-s1" / "config.json", flags=other["flags"], data=other["data"] | {"sha256": "f" * 64})
    change(runs / "meta-s1" / "config.json", environment=other["environment"] | {"device": "a GPU"})
    warnings = [line for line in text_of(runs).splitlines() if line.startswith("**Warning:**")]
    for word in (
        "Data is not",
        "Run is not",
        "Device is not",
        "Policies of the JEL runs are not",
        "jel-s2: another policy",
        "Schedule-free runs do not have the setting that was best in the sweep",
    ):
        assert sum(word in line for line in warnings) == 1, word
    assert len(warnings) == 6


def test_scale_is_that_of_the_runs_not_of_the_preset(runs):
    small = runs.rename(runs.parent / "small")  # what was tried at tiny, in runs 12.8 times as long
    assert row(section(text_of(small), "Table 1: the methods"), "JEL")[7].endswith("+ 156 exploratory")
    paper = small.rename(runs.parent / "paper")
    text = text_of(paper)
    assert "not at the paper's scale" in text and "exploratory" not in section(text, "Table 1: the methods")
    for path in paper.glob("*-s?/config.json"):
        flags = read_json(path)["flags"] | {"total_batch_size": 524_288}
        change(path, parameters=73_531_692, num_iterations=561, flags=flags)
    assert "at the paper's scale" in text_of(paper) and "not at the paper's scale" not in text_of(paper)


def test_further_evidence_is_reported_when_there_is_any(runs):
    assert "Ablations" not in text_of(runs)
    held = {"name": "own mean | held", "test_bpb": [2.4, 2.5], "run_equivalents": 0.0, "verdict": "no difference shown"}
    write(runs / "evidence" / "equal_budget.json", [held])
    write(runs / "evidence" / "ablations.json", [{**held, "name": "4D actions", "test_bpb": [None], "verdict": None}])
    text = text_of(runs)
    assert r"| own mean \| held | 2.4500 ± 0.0707 (2) | 0.0 | no difference shown |" in text
    assert row(section(text, "Ablations and negative results"), "4D actions")[1] == "diverged"
    lost = "**JEL is not shown to beat 1 of 1 controls at the same price: own mean | held: no difference shown.**"
    assert lost in first_paragraph(text)
    assert report.results_record(read_evidence(runs.parent, "tiny"))["equal_budget"] == [held]


def test_the_first_paragraph_says_which_controls_jel_does_not_beat(runs):
    assert "Controls at the same price were not measured (`python -m scripts.ablate`)." in first_paragraph(
        text_of(runs)
    )
    add_sections(runs)
    text = first_paragraph(text_of(runs))
    assert (
        "**JEL is not shown to beat 2 of 3 controls at the same price: CMA-ES over the same constants: no diff" in text
    )
    assert "its own mean, held: JEL is worse (+0.0010 [+0.0001, +0.0020]).** JEL beats 1 of 3 controls" in text
    assert "same price: random search over the same constants: JEL is better (-0.0600 [-0.0900, -0.0300])." in text


def test_tables_of_further_evidence_have_prices_and_verdicts(runs):
    add_sections(runs)
    text = text_of(runs)
    for name, title in SECTION_TITLES.items():
        for given in read_json(runs / "evidence" / f"{name}.json"):
            cells = row(section(text, title), given["name"])
            assert cells[2:] == [f"{given['run_equivalents']:.1f}", given["verdict"]]
            assert cells[1].startswith(f"{statistics.mean(given['test_bpb']):.4f} ± ")


def test_every_group_has_its_multipliers_in_the_figure():
    """Two seeds, corrections for two sets of groups; the log's values have them multiplied in already."""
    policies = [
        {
            "multipliers": {
                "*": {"lr": [2.0 * s, 3.0 * s], "weight_decay": [1.0, 1.0]},
                "wte": {"lr": [20.0 * s, 30.0 * s]},
                "value_embeds": {"lr": [20.0 * s, 30.0 * s]},
                "lm_head": {"lr": [1.0 * s, 1.5 * s]},
            }
        }
        for s in (1, 2)
    ]
    assert report.multipliers_by_groups(policies) == {
        "lr": {
            "block matrices": [[2.0, 3.0], [4.0, 6.0]],
            "wte, value_embeds": [[20.0, 30.0], [40.0, 60.0]],
            "lm_head": [[1.0, 1.5], [2.0, 3.0]],
        },
        "weight_decay": {"all groups": [[1.0, 1.0], [1.0, 1.0]]},
    }


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
        ("meta-s1/result.json", "{}"),
        ("sweep_schedule_free.json", '{"rows": {}, "best": 0}'),
        ("sweep_hand_tuned.json", '{"rows": [3], "best": 0}'),
        ("evidence/ablations.json", "{}"),
    ],
)
def test_damaged_files_are_named(runs, name, content):
    (runs / name).parent.mkdir(exist_ok=True)
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
