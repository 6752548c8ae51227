"""scripts.watch: a run by its tag, its picture beside its log, in colours where rich is installed."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from jel import JelError
from scripts import watch


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = tmp_path / "runs" / "tiny" / "meta-s1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"flags": {"updates": 3}}))
    add_update(folder, 0)
    return folder


def add_update(folder, step):
    shared = {"lr": [step + 1.0, 2.0], "weight_decay": [0.5, 0.5]}
    record = {"step": step, "decision_progress": [0.0, 0.5], "return_mean": 1.0 + step}
    with open(folder / "log.jsonl", "a") as log:
        log.write(json.dumps(record | {"multipliers": {"*": shared, "wte": {"lr": [3.0, 4.0]}}}) + "\n")


def look(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["watch", *map(str, flags)])
    return watch.main()


def test_a_run_by_its_tag_with_its_picture_rewritten_and_nothing_else(run, monkeypatch, capsys):
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert look(monkeypatch, "tiny/meta-s1", "--once") == 0
    shown = capsys.readouterr().out
    assert "update 1 of 3" in shown and all(name in shown for name in ("all/lr 2", "all/weight_decay 0.5", "wte/lr 4"))
    first = (run / "multipliers.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.name != "multipliers.png"} == before
    add_update(run, 1)
    assert look(monkeypatch, run, "--once") == 0  # a folder works too
    assert (run / "multipliers.png").read_bytes() != first and "update 2 of 3" in capsys.readouterr().out
    assert look(monkeypatch, run, "--once", "--picture", run / "other.svg") == 0
    assert b"<svg" in (run / "other.svg").read_bytes()


def test_a_run_that_is_not_there_is_named(run, monkeypatch):
    with pytest.raises(JelError, match="tiny/meta-s2"):
        look(monkeypatch, "tiny/meta-s2", "--once")


@pytest.mark.skipif(not importlib.util.find_spec("rich"), reason="needs rich")
def test_a_curve_and_its_legend_have_one_colour():
    rows = ["      10 |  oo", "       1 |**", " " * 9 + "+------", " " * 10 + "* all/lr 1", " " * 10 + "o b/lr 9"]
    chart = "\n".join(rows)
    styled = watch.coloured(chart)
    colours = {(chart[span.start], span.style) for span in styled.spans}
    assert styled.plain == chart and colours == {("*", watch.COLORS[0]), ("o", watch.COLORS[1])}


def test_without_rich_it_prints_plainly(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert watch.printer() is print
