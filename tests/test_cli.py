"""The `jel` command, and what it shows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import jel
from jel.cli import main
from jel.preview import preview
from jel.show import as_csv, as_text
from tests.jel_parts import FEEDBACK, lively_policy
from tests.loops import adamw, make_model, warm_up

ROWS = [(0.0, {"*": {"lr": 0.5, "weight_decay": 2.0}}), (0.25, {"*": {"lr": 1.5}, "1": {"lr": 0.1}}), (0.5, {})]
SCHEDULE = jel.schedules.piecewise(ROWS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.json").write_text(json.dumps(SCHEDULE))
    (tmp_path / "user_code.py").write_text(
        "from tests.loops import adamw, make_model\ndef make(): return adamw(make_model())\nbroken = 3\n"
        "def failing(): return {}['data']\ntext = 'a task'\n"
    )
    (tmp_path / "foreign.json").write_text('{"format": "a recipe for soup"}')
    return tmp_path


def test_export_of_a_policy_replays_it(folder, capsys):
    policy = lively_policy()
    jel.save_policy(policy, folder / "p", {})
    assert main(["export", "p.safetensors", "--points", "7", "--out", "out.json"]) == 0
    assert main(["export", "p", "--points", "7"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "out.json").read_text())
    replay = jel.ScheduleController("out.json")
    for i in range(7):
        assert replay.decide({"progress": i / 7}) == policy.mean_multipliers({"progress": i / 7})
    assert main(["export", "default", "--out", "d.json"]) == 0 and main(["show", "default"]) == 0


def test_csv_replays_with_nothing_but_a_csv_reader(folder):
    """In any framework: the last line at or before the progress holds; a group's own lines over those of "*"."""
    assert main(["export", "s.json", "--out", "s.csv"]) == 0
    lines = list(csv.DictReader((folder / "s.csv").open()))
    controller = jel.ScheduleController(SCHEDULE)
    for progress in (0.0, 0.1, 0.25, 0.3, 0.5, 0.99):
        decided = controller.decide({"progress": progress})
        for group in ("0", "1"):
            want = jel.knobs.multipliers_of_group(decided, group)
            held: dict = {}
            for name in ("*", group):
                for line in lines:
                    if line["group"] == name and float(line["progress"]) <= progress:
                        held[line["hyperparameter"]] = float(line["multiplier"])
            assert {k: v for k, v in held.items() if v != 1} == {k: v for k, v in want.items() if v != 1}


def test_show_draws_every_curve_and_a_picture(folder, capsys):
    assert main(["show", "s.json", "--png", "plot.png"]) == 0
    out = capsys.readouterr().out
    assert "contract: any optimizer" in out and "3 decisions" in out
    for name in ("*.lr", "*.weight_decay", "1.lr"):
        line = next(line for line in out.splitlines() if line.split()[:1] == [name])
        assert len(line.split()[1]) == 48
    assert "x0.5 to x1.5" in out and (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    lr = next(line for line in as_text(SCHEDULE, 8).splitlines() if "*.lr" in line).split()[1]
    assert lr == "▁▁██▅▅▅▅"  # 1 lies log 2 / log 3 of the way from 0.5 to 1.5


def test_apply_shows_what_a_scheduler_does(folder, capsys):
    assert main(["apply", "s.json", "user_code:make", "--total-steps", "8", "--dry-run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and "adamw, 2 tensors: lr 0.003 -> from step 0: 0.0015, 2: 0.0045, 4: 0.003" in out[0]
    assert main(["apply", "s.json", "user_code:make", "--total-steps", "8", "--mode", "shape", "--dry-run"]) == 0
    assert "lr 0.003 -> from step 0: 0.001, 2: 0.003, 4: 0.002" in capsys.readouterr().out


def test_fit_learns_on_a_task_of_the_users(folder, capsys):
    Path("task_of_mine.py").write_text("from tests.loop_parts import quadratic\n\ntask = quadratic(0.05, steps=20)\n")
    call = ["fit", "task_of_mine:task", "--method", "random", "--budget", "30", "--base", "30", "--out", "fit"]
    assert main(call) == 0
    kept = json.loads(Path("fit/card.json").read_text())["kept"]
    assert kept in ("learned", "carried") and jel.load_schedule("fit/schedule.json")["decisions"]
    shown = capsys.readouterr().out
    assert "saved: fit/schedule.json" in shown and ("no picture" in shown) != Path("fit/fit.png").exists()
    assert main(call) == 2 and "holds a fit already" in capsys.readouterr().err


def test_a_preview_is_the_run_and_gives_the_optimizer_back():
    optimizer, other = adamw(make_model()), adamw(make_model())
    effects = preview(optimizer, 8, SCHEDULE, warm_up(optimizer))
    scheduler = jel.Scheduler(other, 8, SCHEDULE, warm_up(other))
    for step in range(8):
        for effect in effects:
            value = [v for at, v in effect.changes if at <= step][-1]
            assert value == other.param_groups[int(effect.group)][effect.hyperparameter]
        other.step()
        scheduler.step()
    jel.Scheduler(optimizer, 8, SCHEDULE)  # it is free
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
    watching = jel.PolicyController(lively_policy(features=FEEDBACK))
    watching.contract = jel.ANY
    with pytest.raises(jel.JelError, match="observes what it was not told"):
        preview(adamw(make_model()), 8, watching)
    free = adamw(make_model())
    with pytest.raises(jel.JelError, match="watches the run"):
        preview(free, 8, "lhopt")
    jel.Scheduler(free, 8, "lhopt")  # nothing was left behind


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("show nope.json", "nope.json does not exist"),
        ("show user_code.py", "user_code.py is no schedule and no policy"),
        ("show no_such_policy", "does not exist"),
        ("show foreign.json", "foreign.json is neither a schedule nor a policy's card"),
        ("fit user_code:failing", "user_code:failing() fails (KeyError: 'data')"),
        ("fit user_code:text", "user_code:text() fails (TypeError: 'str' object is not callable)"),
        ("export s.json --out s.txt", "must end in .json or .csv"),
        ("export default --points 0", "--points is 0"),
        ("apply s.json user_code:make --total-steps 8", "give --dry-run"),
        ("apply s.json user_code --total-steps 8 --dry-run", "give MODULE:NAME"),
        ("apply s.json no_such:make --total-steps 8 --dry-run", "does not import"),
        ("apply s.json user_code:nothing --total-steps 8 --dry-run", "has no nothing"),
        ("apply s.json user_code:broken --total-steps 8 --dry-run", "is no torch optimizer"),
        ("apply s.json user_code:make --total-steps 0 --dry-run", "total_steps is 0"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, arguments, message):
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("jel: error: ") and error.count("\n") == 1 and message in error


def test_as_csv_has_a_header():
    assert as_csv(SCHEDULE).splitlines()[0] == "progress,group,hyperparameter,multiplier"
