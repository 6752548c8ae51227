"""scripts.sweep: what it plans, and that it starts, skips, records, reports and stops runs as it says."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from nanochat.common import UserError
from nanochat.preemption import REQUEUE_EXIT_CODE
from scripts import base_train
from scripts.presets import parse_with_preset
from scripts.sweep import __main__ as sweep
from scripts.sweep import runs as sweep_runs
from scripts.sweep.__main__ import best_flags, find_places, plan
from scripts.sweep.runs import Job, Places, Progress, alone, describe, row_of, steps_done
from tests.conftest import ROOT

BEST = {"schedule_free": ["--optimizer", "schedule-free", "--sf-lr", "2.0"], "hand_tuned": ["--matrix-lr", "0.06"]}


@pytest.fixture
def home(base, tmp_path, monkeypatch):
    """A base directory of this test's own, with the tokenizer; signal handlers are put back at the end."""
    shutil.copytree(base / "tokenizer", tmp_path / "tokenizer")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def start(home, corpus, monkeypatch):
    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["sweep", "--preset", "smoke", "--data", str(corpus), *flags])
        return sweep.main()

    return main


def parsed(job: Job):
    return parse_with_preset(base_train.flags(), "base_train", job.argv)


# -----------------------------------------------------------------------------
# the plan


def test_the_schedule_free_plan_is_table_3():
    jobs = plan("schedule-free", "paper", [7, 8], 561)
    assert [job.tag for job in jobs] == [f"paper/sf-{i}" for i in range(8)]
    runs = [parsed(job) for job in jobs]
    assert [(run.sf_lr, run.sf_wd, run.sf_warmup) for run in runs] == [
        (0.5, 0, 0),
        (0.5, 0.01, 0),
        (1, 0, 0),
        (1, 0.01, 0),
        (2, 0, 0),
        (2, 0.01, 0),
        (1, 0.01, 100),
        (1, 0.01, 300),
    ]
    assert {(r.optimizer, r.matrix_lr, r.weight_decay, r.seed, r.resume, r.max_recoveries) for r in runs} == {
        ("schedule-free", 0.02, 0.2, 7, "auto", 0)
    }
    assert [job.setting["warmup"] for job in plan("schedule-free", "tiny", [7], 250)] == [0] * 6 + [45, 134]


def test_the_hand_tuned_plan_is_as_large_and_scales_every_rate():
    jobs = plan("hand-tuned", "tiny", [7], 250, common=["--data", "texts"])
    runs = [parsed(job) for job in jobs]
    assert len(jobs) == len(sweep.SCHEDULE_FREE) == len({tuple(job.flags) for job in jobs})
    for job, run in zip(jobs, runs):
        rates = (run.matrix_lr, run.embedding_lr, run.unembedding_lr, run.scalar_lr)
        assert rates == pytest.approx([rate * job.setting["lr_scale"] for rate in sweep.HAND_TUNED_RATES.values()])
        assert (run.weight_decay, run.data) == (job.setting["weight_decay"], "texts")
        assert (run.hparams, run.seed, run.max_recoveries) == ("hand-tuned", 7, 0)


def test_the_methods_plan_is_every_method_with_every_seed():
    jobs = {job.name: job for job in plan("methods", "tiny", [1, 2], 250, "/a/policy", BEST)}
    methods = ("jel", "hand_tuned", "schedule_free", "suboptimal")
    assert jobs.keys() == {f"{method}-s{seed}" for method in methods for seed in (1, 2)}
    jel, hand, free, base = (parsed(jobs[f"{method}-s2"]) for method in methods)
    assert (jel.hparams, jel.controller, jel.policy, jel.model_tag) == ("uniform", "jel", "/a/policy", "tiny/jel-s2")
    assert (hand.hparams, hand.matrix_lr, free.optimizer, free.sf_lr) == ("hand-tuned", 0.06, "schedule-free", 2.0)
    assert {**vars(base), "controller": "jel", "policy": "/a/policy", "model_tag": "tiny/jel-s2"} == vars(jel)
    assert {run.seed for run in (jel, hand, free, base)} == {2} and base.eval_every == 25  # their curves are drawn
    assert "--policy" not in plan("methods", "tiny", [1], 250, None, BEST)[1].flags


# -----------------------------------------------------------------------------
# runs


def test_rows_are_written_and_a_second_start_runs_nothing(home, start, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "SCHEDULE_FREE", [(1.0, 1e38, 0), (0.5, 0.01, 300)])
    assert start("--what", "schedule-free", "--seeds", "3", "4") == 0
    printed = capsys.readouterr().out
    assert "scaled by 12/561" in printed and "2/2 sf-" in printed
    assert "sf-0 lr 1.0 wd 1e+38 warmup 0: diverged" in printed
    path = home / "runs" / "smoke" / "sweep_schedule_free.json"
    written = json.loads(path.read_text())
    bad, good = written["rows"]
    result = json.loads((home / "runs" / "smoke" / "sf-1" / "result.json").read_text())
    assert (written["best"], written["runs"], result["flags"]["seed"]) == (1, 2, 3)
    assert all(good[key] == result[key] for key in ("val_bpb", "train_loss", "seconds", "tokens"))
    assert (good["lr"], good["wd"], good["warmup"], good["tag"]) == (0.5, 0.01, 6, "smoke/sf-1") and "error" not in good
    assert bad["val_bpb"] is None and "the run diverged" in bad["error"] and bad["seconds"] > 0
    assert best_flags(path.parent, "schedule_free")[:4] == ["--optimizer", "schedule-free", "--sf-lr", "0.5"]
    assert "step 00011/00012" in (home / "runs" / "smoke" / "sf-1" / "output.txt").read_text()

    monkeypatch.setattr(subprocess, "Popen", None)  # nothing may be started any more
    before = path.read_bytes()
    path.unlink()
    assert start("--what", "schedule-free", "--seeds", "3") == 0 and path.read_bytes() == before
    assert "2 runs, 2 done already" in capsys.readouterr().out
    monkeypatch.setattr(sweep, "SCHEDULE_FREE", [(1.0, 1e38, 0), (0.25, 0.01, 300)])
    with pytest.raises(UserError, match="sf-1 holds a run with other flags .*--sf-lr 0.5 -> 0.25.*or delete"):
        start("--what", "schedule-free", "--seeds", "3")
    monkeypatch.setattr(sweep, "SCHEDULE_FREE", [(1.0, 1e37, 0), (0.5, 0.01, 300)])
    with pytest.raises(UserError, match="sf-0 holds a run with other flags"):
        start("--what", "schedule-free", "--seeds", "3")


def test_a_run_that_fails_stops_the_sweep_in_one_line(home, start, monkeypatch):
    monkeypatch.setattr(sweep, "HAND_TUNED", [(1.0, 0.0)])
    (home / "runs" / "smoke" / "ht-0" / "config.json").mkdir(parents=True)
    line = r"^run smoke/ht-0 failed with exit status 2 \(.*directory.*\); all it printed is in .*ht-0/output.txt$"
    with pytest.raises(UserError, match=line):
        start("--what", "hand-tuned")
    assert not (home / "runs" / "smoke" / "sweep_hand_tuned.json").exists()


@pytest.mark.parametrize("number, whole_group", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_stop_saves_the_run_and_starts_no_other(home, corpus, number, whole_group):
    """Signalled alone, as by kill, or with its run, as by Ctrl-C: either way it saves, and nothing is left behind."""
    program = (
        "from scripts.sweep import __main__ as sweep; sweep.HAND_TUNED = [(1.0, 0.0), (1.0, 0.1)]; "  # endless, in steps of 0.5 s
        "sweep.HAND_TUNED_RATES = {'--num-iterations': 1e5, '--total-batch-size': 12800}; "
        "sweep.run_main(sweep.main)"
    )
    flags = ["--preset", "smoke", "--data", str(corpus), "--what", "hand-tuned", "--jobs", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    job, deadline = Job("smoke/ht-0", {}, [], []), time.monotonic() + 60
    while steps_done(job) == 0 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    assert process.wait(60) == REQUEUE_EXIT_CODE
    assert "stopped with 0 of 2 runs done; run the same command again" in process.stdout.read()
    saved = max(int(path.name.partition("_")[2]) for path in (home / "runs" / job.tag / "checkpoints").glob("step_*"))
    assert saved == steps_done(job) > 0 and not (home / "runs" / "smoke" / "ht-1").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_the_lock_is_held_as_long_as_a_run_lives(tmp_path):
    with alone(tmp_path / "lock") as lock:
        run = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    with open(tmp_path / "lock") as f:
        with pytest.raises(BlockingIOError):
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        run.kill()
        run.wait()
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)


# -----------------------------------------------------------------------------
# bad input, places, progress


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--what", "schedule-free", "--seeds", "1", "1"), "--seeds 1 1 names a seed twice"),
        (("--what", "schedule-free", "--policy", "p"), "--policy is for --what methods"),
        (("--what", "schedule-free", "--jobs", "0"), "--jobs is 0"),
        (("--what", "hand-tuned", "--preset", "paper"), "paper's upper bound"),
        (("--what", "methods"), "first run: python -m scripts.sweep --preset smoke --what schedule-free"),
        (("--what", "schedule-free", "--data", "/nowhere"), "/nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(start, monkeypatch, flags, words):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(UserError) as e:
        start(*flags)
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "JSON"),
        ("[]", "not what a sweep writes"),
        ('{"rows": [], "best": 0}', "not what a sweep writes"),
        ('{"rows": [], "best": null}', "all of them diverged"),
    ],
)
def test_a_damaged_sweep_is_not_built_on(tmp_path, text, words):
    (tmp_path / "sweep_schedule_free.json").write_text(text)
    with pytest.raises(UserError, match=words):
        best_flags(tmp_path, "schedule_free")


@pytest.mark.parametrize(
    "preset, gpus, flags, jobs, nproc",
    [
        ("paper", 8, (), 1, 8),
        ("paper", 6, (), 1, 4),
        ("paper", 1, (), 1, 1),
        ("paper", 8, ("--nproc", "2"), 4, 2),
        ("tiny", 4, (), 4, 1),
        ("tiny", 0, ("--jobs", "3"), 3, 1),
        ("tiny", 0, ("--jobs", "30"), 8, 1),
    ],
)
def test_places_fill_the_machine(monkeypatch, preset, gpus, flags, jobs, nproc):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    args = parse_with_preset(sweep.flags(), "sweep", ["--preset", preset, "--what", "methods", *flags])
    every_run = parse_with_preset(base_train.flags(), "base_train", ["--preset", preset])
    assert find_places(args, every_run, 8) == Places(jobs, nproc, [str(i) for i in range(gpus)])


def test_side_by_side_runs_get_gpus_of_their_own(home, monkeypatch):
    started = []
    note = lambda command, env, **_: started.append((command[2], env["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setattr(subprocess, "Popen", note)
    job, places = plan("methods", "paper", [1], 561, None, BEST)[0], Places(2, 2, ["4", "5", "6", "7"])
    places.start(job, 0, 3), places.start(job, 1, 3), Places(1, 1, ["4"]).start(job, 0, 3)
    assert started == [("torch.distributed.run", "4,5"), ("torch.distributed.run", "6,7"), ("scripts.base_train", "4")]


def test_progress_tells_steps_and_time_left(home, monkeypatch, capsys):
    jobs = plan("methods", "smoke", [1], 100, None, BEST)
    log = home / "runs" / jobs[1].tag / "log.jsonl"
    log.parent.mkdir(parents=True)
    whole = [json.dumps({"step": s, "loss": 1.0, "multipliers": {"*": {"lr": 1.0}}}) + "\n" for s in range(40)]
    log.write_text("".join(whole) + '{"step": 40, "lo')
    assert steps_done(jobs[1]) == 40 and steps_done(jobs[0]) == 0 and row_of(jobs[1]) is None
    clock = iter([0.0, 9.0, 10.0])
    monkeypatch.setattr(sweep_runs.time, "monotonic", lambda: next(clock))
    rows = {jobs[0].tag: {"val_bpb": 1.5, "seconds": 75.0}}
    progress = Progress(jobs, rows, 100)
    with open(log, "a") as f:
        f.write('ss": 1.0}\n' + '{"step": 65, "loss": 1.0}\n')
    progress.status(jobs[1:2])
    progress.status(jobs[1:2])
    progress.ended(jobs[0], rows[jobs[0].tag])
    assert capsys.readouterr().out.splitlines() == [
        "1/4 done | jel-s1 66/100 | left 1m30s",
        "1/4 hand_tuned-s1: val_bpb 1.5000, 1m15s",
    ]
    assert describe(Job("a/b", {"lr": 1.0}, [], []), {"val_bpb": None, "seconds": 1.0}) == "b lr 1.0: diverged, 1s"
