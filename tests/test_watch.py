"""Watching a log: what is drawn is what was logged."""

from __future__ import annotations

import argparse
import json

import pytest

from jel import JelError, watch
from jel.tracking import Tracker


def meta_records(updates: int) -> list[dict]:
    """As meta-training logs them: in update u the learning rate starts at u + 1."""
    multipliers = lambda u: {"*": {"lr": [u + 1.0, 2.0], "weight_decay": [0.5, 0.5]}, "head": {"lr": [3.0, 3.0]}}
    known = {"decision_progress": [0.0, 0.5], "return_mean": 1.0}
    return [{"step": u, **known, "multipliers": multipliers(u)} for u in range(updates)]


def arguments(*given) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    watch.add_arguments(parser)
    return parser.parse_args([*map(str, given)])


def shown(*given) -> str:
    lines: list[str] = []
    assert watch.run_command(arguments(*given), lines.append) == 0
    return "\n".join(lines)


def test_a_view_of_meta_training_has_the_newest_policy_and_earlier_ones():
    view = watch.view_of(meta_records(10), total=20)
    assert view.title == "run: update 10 of 20"
    assert view.multipliers["all/lr"] == [(0.0, 10.0), (0.5, 2.0), (1.0, 2.0)]
    assert [curves["all/lr"][0][1] for curves in view.earlier] == [1.0, 4.0, 7.0]
    assert view.multipliers.keys() == {"all/lr", "all/weight_decay", "head/lr"}
    assert watch.view_of(meta_records(1)).earlier == []


@pytest.mark.parametrize("written_by", ["tracker", "base_train"])
def test_a_view_of_a_run_has_every_step(written_by, tmp_path):
    multipliers = lambda i: {"*": {"lr": 1.0 + i}}
    if written_by == "tracker":
        with Tracker(tmp_path, total_steps=10) as tracker:
            for i in range(5):
                tracker.log(i, loss=2.0 - i, multipliers=multipliers(i))
    else:
        lines = [{"step": i, "loss": 2.0 - i, "multipliers": multipliers(i), "dt": 0.1} for i in range(5)]
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / "config.json").write_text(json.dumps({"num_iterations": 10, "flags": {"num_iterations": -1}}))
    view = watch.view_of(watch.read_records(tmp_path), watch.total_of(tmp_path))
    assert view.title == "run: step 5 of 10"
    assert view.multipliers == {"all/lr": [(i / 10, 1.0 + i) for i in range(5)]}
    assert view.losses == {"train/loss": [(i, 2.0 - i) for i in range(5)]}


def test_a_chart_has_the_extremes_in_its_first_and_last_row():
    lines = watch.text_chart({"a": [(0, 0.0), (1, 10.0)], "b": [(0, 5.0), (1, 5.0)]}, width=50, height=11)
    assert lines[0].split()[0] == "10" and lines[0].endswith("*") and lines[10].strip().startswith("0 |*")
    assert "o" in lines[5] and max(map(len, lines)) <= 50
    assert lines[-2:] == [" " * 10 + "* a 10", " " * 10 + "o b 5"]


@pytest.mark.parametrize("curves", [{}, {"a": []}, {"a": [(0, float("nan"))]}, {"a": [(0.0, -1.0)]}])
def test_nothing_to_draw(curves):
    assert watch.text_chart(curves, log=True) == ["(nothing to draw yet)"]


@pytest.mark.parametrize("curve", [[(0, 1.0)], [(0, 1.0), (0, 2.0)], [(i / 500, 1.0) for i in range(500)]])
def test_any_curve_fits(curve):
    lines = watch.text_chart({"a": curve}, width=40, log=True)
    assert max(map(len, lines)) <= 40 and any("*" in line for line in lines[:10])


def test_the_command(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in meta_records(3)) + '{"step": 3, "mul')
    picture = tmp_path / "now.png"
    text = shown(tmp_path, "--once", "--picture", picture)
    assert "update 3" in text and "all/lr 2" in text and "train/return_mean" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "result.json").write_text("{}")
    assert "update 3" in shown(tmp_path)  # a finished run ends the watching
    with pytest.raises(JelError, match="cannot draw"):
        shown(tmp_path, "--picture", tmp_path / "now.doc")
    with pytest.raises(JelError, match="no log to read"):
        shown(tmp_path / "nowhere")


def test_following_draws_again_when_the_log_has_grown(tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps(meta_records(1)[0]) + "\n")

    def wait(seconds):
        if len(looks) == 1:
            log.write_text("".join(json.dumps(r) + "\n" for r in meta_records(2)))
        if len(looks) == 3:
            raise KeyboardInterrupt
        looks.append(seconds)

    looks: list[float] = []
    monkeypatch.setattr(watch.time, "sleep", wait)
    text = shown(tmp_path)
    assert text.count("update 1\n") == text.count("update 2\n") == 1
