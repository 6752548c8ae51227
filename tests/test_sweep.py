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
from scripts.presets import PRESETS, parse_with_preset
from scripts.sweep import __main__ as sweep
from scripts.sweep import progress as sweep_progress
from scripts.sweep import settings
from scripts.sweep.__main__ import best_flags, find_devices, find_policies
from scripts.sweep.progress import Job, Progress, describe, steps_done
from scripts.sweep.runs import Devices, alone, row_of
from scripts.sweep.settings import METHODS, Plan, lr_multipliers, run_price
from tests.conftest import ROOT

BEST = {
    "schedule_free": ["--optimizer", "schedule-free", "--sf-lr", "2.0"],
    "hand_tuned": ["--matrix-lr", "0.06"],
    "best_constant": ["--hparams", "uniform", "--base-lr", "0.04", "--base-wd", "0.1"],
}


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
    jobs = Plan("paper", [7, 8], 561).schedule_free()
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
    assert {(r.sf_beta1, r.sf_beta2, r.sf_muon_schedule, r.test_tokens) for r in runs} == {(0.9, 0.999, "constant", 0)}
    assert [job.setting["warmup"] for job in Plan("tiny", [7], 250).schedule_free()] == [0] * 6 + [45, 134]


def test_the_fair_plan_is_as_large_and_stands_around_the_best_of_table_3():
    jobs = Plan("tiny", [7], 250).schedule_free_fair({"lr": 0.5, "wd": 0.01, "warmup": 45})
    runs = [parsed(job) for job in jobs]
    assert len(jobs) == len(settings.SCHEDULE_FREE) == len({tuple(job.flags) for job in jobs})
    assert {(run.sf_wd, run.sf_warmup, run.optimizer, run.test_tokens) for run in runs} == {
        (0.01, 45, "schedule-free", 0)
    }
    assert {run.sf_lr for run in runs} == {0.5, 0.15, 0.05} and {run.matrix_lr for run in runs} == {0.02, 0.06}
    assert {run.sf_muon_schedule for run in runs} == {"constant", "warmdown"}
    assert {(run.sf_beta1, run.sf_beta2) for run in runs} == {(0.9, 0.999), (0.8, 0.95)}
    assert all(run.sf_lr == job.setting["lr"] and run.sf_beta1 == job.setting["beta1"] for job, run in zip(jobs, runs))


def test_the_hand_tuned_plan_is_smaller_than_schedule_frees_and_scales_every_rate():
    jobs = Plan("tiny", [7], 250, ["--data", "texts"]).hand_tuned()
    runs = [parsed(job) for job in jobs]
    assert len(jobs) == len({tuple(job.flags) for job in jobs}) == 12
    assert len(jobs) < len(settings.SCHEDULE_FREE) + len(settings.SCHEDULE_FREE_FAIR)
    for job, run in zip(jobs, runs):
        rates = (run.matrix_lr, run.embedding_lr, run.unembedding_lr, run.scalar_lr)
        assert rates == pytest.approx([rate * job.setting["lr_scale"] for rate in settings.HAND_TUNED_RATES.values()])
        assert (run.weight_decay, run.data) == (job.setting["weight_decay"], "texts")
        assert (run.hparams, run.seed, run.max_recoveries, run.test_tokens) == ("hand-tuned", 7, 0, 0)


def test_a_constant_is_the_uniform_base_multiplied():
    run = parsed(Plan("tiny", [7], 250).constant(3, 46.4, 10.0, 1e-3, 1e-2))
    assert (run.hparams, run.base_lr, run.base_wd, run.controller) == ("uniform", 0.0464, 0.1, "none")
    assert (run.seed, run.test_tokens, run.max_recoveries, run.model_tag) == (7, 0, 0, "tiny/bc-3")
    assert lr_multipliers(4) == [10, 21.5, 46.4, 100] and lr_multipliers(2) == [10, 100] and lr_multipliers(1) == [31.6]


def test_the_methods_plan_is_every_method_with_every_seed():
    policies = {1: "/one/policy", 2: "/two/policy"}
    planned = Plan("tiny", [1, 2], 250).methods(policies, BEST)
    jobs = {job.name: job for job in planned}
    assert [job.name for job in planned] == [f"{method}-s{seed}" for seed in (1, 2) for method in METHODS]
    assert METHODS == ("hand_tuned", "jel", "best_constant", "schedule_free", "suboptimal")
    hand, jel, constant, free, base = (parsed(jobs[f"{method}-s2"]) for method in METHODS)
    assert (jel.hparams, jel.controller, jel.policy, jel.model_tag) == ("uniform", "jel", "/two/policy", "tiny/jel-s2")
    assert (hand.hparams, hand.matrix_lr, free.optimizer, free.sf_lr) == ("hand-tuned", 0.06, "schedule-free", 2.0)
    assert {**vars(base), "controller": "jel", "policy": "/two/policy", "model_tag": "tiny/jel-s2"} == vars(jel)
    assert {**vars(base), "base_lr": 0.04, "base_wd": 0.1, "model_tag": "tiny/best_constant-s2"} == vars(constant)
    for run in (jel, hand, constant, free, base):  # a validation curve is drawn, and the test split is read
        assert (run.seed, run.eval_every, run.test_tokens) == (2, 25, 65536)
    assert "--policy" not in Plan("tiny", [1], 250).methods({1: None}, BEST)[1].flags


def test_the_price_of_a_run_is_the_median_of_the_settings_that_finished():
    rows = [{"val_bpb": 2.0, "flops": f} for f in (3.0, 1.0, 2.0)] + [{"val_bpb": None, "flops": None}]
    assert run_price(rows) == 2.0 and run_price([]) is run_price(rows[3:]) is None


# -----------------------------------------------------------------------------
# runs


def test_rows_are_written_and_a_second_start_runs_nothing(home, start, monkeypatch, capsys):
    monkeypatch.setattr(settings, "SCHEDULE_FREE", [(1.0, 1e38, 0), (0.5, 0.01, 300)])
    assert start("--what", "schedule-free", "--seeds", "3", "4") == 0
    printed = capsys.readouterr().out
    assert "scaled by 12/561" in printed and "2/2 sf-" in printed
    assert "sf-0 lr 1.0 wd 1e+38 warmup 0: diverged" in printed
    path = home / "runs" / "smoke" / "sweep_schedule_free.json"
    written = json.loads(path.read_text())
    bad, good = written["rows"]
    result = json.loads((home / "runs" / "smoke" / "sf-1" / "result.json").read_text())
    assert (written["best"], written["runs"], result["flags"]["seed"]) == (1, 2, 3)
    assert all(
        good[key] == result[key]
        for key in ("val_bpb", "train_loss", "seconds", "core_seconds", "flops", "tokens", "recoveries")
    )
    assert (good["lr"], good["wd"], good["warmup"], good["tag"]) == (0.5, 0.01, 6, "smoke/sf-1") and "error" not in good
    assert bad["val_bpb"] is None and "the run diverged" in bad["error"] and bad["core_seconds"] >= bad["seconds"] > 0
    assert (good["recoveries"], bad["recoveries"], bad["flops"], result["test_bpb"]) == (0, 0, None, None)
    assert best_flags(path.parent, "schedule_free")[:4] == ["--optimizer", "schedule-free", "--sf-lr", "0.5"]
    assert "step 00011/00012" in (home / "runs" / "smoke" / "sf-1" / "output.txt").read_text()

    monkeypatch.setattr(subprocess, "Popen", None)  # nothing may be started any more
    before = path.read_bytes()
    path.unlink()
    assert start("--what", "schedule-free", "--seeds", "3") == 0 and path.read_bytes() == before
    assert "2 runs, 2 done already" in capsys.readouterr().out
    monkeypatch.setattr(settings, "SCHEDULE_FREE", [(1.0, 1e38, 0), (0.25, 0.01, 300)])
    with pytest.raises(UserError, match="sf-1 holds a run with other flags .*--sf-lr 0.5 -> 0.25.*or delete"):
        start("--what", "schedule-free", "--seeds", "3")
    monkeypatch.setattr(settings, "SCHEDULE_FREE", [(1.0, 1e37, 0), (0.5, 0.01, 300)])
    with pytest.raises(UserError, match="sf-0 holds a run with other flags"):
        start("--what", "schedule-free", "--seeds", "3")


def test_a_sweep_elsewhere_has_its_own_folder_and_flags(home, start, monkeypatch):
    monkeypatch.setattr(settings, "HAND_TUNED", [(1.0, 0.0)])
    assert start("--what", "hand-tuned", "--folder", "deep/er", "--", "--depth", "3", "--num-iterations", "3") == 0
    folder = home / "runs" / "smoke" / "deep" / "er"
    flags = json.loads((folder / "ht-0" / "result.json").read_text())["flags"]
    assert (flags["depth"], flags["num_iterations"], flags["hparams"]) == (3, 3, "hand-tuned")
    assert best_flags(folder, "hand_tuned")[:2] == ["--matrix-lr", "0.06"]
    assert [path.name for path in (home / "runs" / "smoke").iterdir()] == ["deep"]
    with pytest.raises(UserError, match="first run: python .* --preset smoke --what schedule-free --folder deep/er$"):
        start("--what", "schedule-free-fair", "--folder", "deep/er")


def test_a_run_that_fails_stops_the_sweep_in_one_line(home, start, monkeypatch):
    monkeypatch.setattr(settings, "HAND_TUNED", [(1.0, 0.0)])
    (home / "runs" / "smoke" / "ht-0" / "config.json").mkdir(parents=True)
    line = r"^run smoke/ht-0 failed with exit status 2 \(.*directory.*\); all it printed is in .*ht-0/output.txt$"
    with pytest.raises(UserError, match=line):
        start("--what", "hand-tuned")
    assert not (home / "runs" / "smoke" / "sweep_hand_tuned.json").exists()


@pytest.mark.parametrize("number, whole_group", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_stop_saves_the_run_and_starts_no_other(home, corpus, number, whole_group):
    """Signalled alone, as by kill, or with its run, as by Ctrl-C: either way it saves, and nothing is left behind."""
    program = (
        "from scripts.sweep import __main__ as sweep, settings; "
        "settings.HAND_TUNED = [(1.0, 0.0), (1.0, 0.1)]; "  # endless, in steps of 0.5 s
        "settings.HAND_TUNED_RATES = {'--num-iterations': 1e5, '--total-batch-size': 12800}; "
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
# bad input, devices, progress


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--what", "schedule-free", "--seeds", "1", "1"), "--seeds 1 1 names a seed twice"),
        (("--what", "schedule-free", "--policy", "p"), "--policy is for --what methods"),
        (("--what", "schedule-free", "--jobs", "0"), "--jobs is 0"),
        (("--what", "schedule-free", "--settings", "0"), "must be at least 1"),
        (("--what", "best-constant", "--settings", "0"), "must be at least 1"),
        (("--what", "schedule-free-fair"), "first run: python -m scripts.sweep --preset smoke --what schedule-free"),
        (("--what", "hand-tuned", "--preset", "paper"), "paper's upper bound"),
        (("--what", "methods"), "first run: python -m scripts.sweep --preset smoke --what schedule-free"),
        (("--what", "schedule-free", "--data", "/nowhere"), "/nowhere"),
        (("--what", "schedule-free", "--folder", "../.."), "does not name a folder inside"),
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


def sweep_of(bpb, *flags):
    return json.dumps({"rows": [{"val_bpb": bpb, "flags": flags, "flops": 10.0}], "best": 0})


def test_schedule_free_is_the_best_of_both_its_sweeps(tmp_path, capsys):
    (tmp_path / "sweep_schedule_free.json").write_text(sweep_of(2.0, "of", "the paper"))
    assert best_flags(tmp_path, "schedule_free") == ["of", "the paper"]
    assert "--what schedule-free-fair was not run" in capsys.readouterr().out
    for bpb, best in ((2.1, ["of", "the paper"]), (1.9, ["fair"])):
        (tmp_path / "sweep_schedule_free_fair.json").write_text(sweep_of(bpb, "fair"))
        assert best_flags(tmp_path, "schedule_free") == best


def test_every_seed_has_the_policy_it_learned(tmp_path, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(sweep, "load_controller", lambda name, policy: loaded.append(policy))
    assert find_policies(None, tmp_path, [1, 2]) == {1: None, 2: None}
    assert "shipped with the package for every seed" in capsys.readouterr().out
    mine = [tmp_path / f"meta-s{seed}" / "policy.safetensors" for seed in (1, 2)]
    mine[0].parent.mkdir()
    mine[0].touch()
    with pytest.raises(UserError, match=r"no policy for seed 2; first run: .*meta_train .*--seed 2 .*/meta-s2"):
        find_policies(None, tmp_path, [1, 2])
    assert find_policies("shipped", tmp_path, [1, 2]) == {1: None, 2: None}
    assert find_policies("/a/policy", tmp_path, [1, 2]) == {1: "/a/policy", 2: "/a/policy"}
    mine[1].parent.mkdir()
    mine[1].touch()
    loaded.clear()
    assert find_policies(None, tmp_path, [1, 2]) == {1: str(mine[0]), 2: str(mine[1])}
    assert sorted(loaded) == sorted(map(str, mine))


@pytest.mark.parametrize("spent, runs", [(64.0, 6), (12.0, 4)])
def test_the_best_constant_gets_as_many_runs_as_meta_training_costs(home, start, monkeypatch, capsys, spent, runs):
    """All but the last two are learning rates; the last two are the best of them with other weight decays."""
    folder, planned = home / "runs" / "smoke", []
    (folder / "meta-s3").mkdir(parents=True)
    (folder / "meta-s3" / "result.json").write_text(json.dumps({"flops": spent}))
    (folder / "sweep_schedule_free.json").write_text(sweep_of(2.0))

    def finish(jobs, rows, *others):
        planned.append(len(jobs))
        for job in jobs:
            distance = abs(job.setting["lr_multiplier"] - 21.5) + abs(job.setting["wd_multiplier"] - 0.1)
            rows[job.tag] = {**job.setting, "val_bpb": distance, "flags": job.flags, "seconds": 1, "recoveries": 0}
        return True

    monkeypatch.setattr(sweep, "run_jobs", finish)
    monkeypatch.setitem(PRESETS["smoke"], "sweep", {})  # without its number of settings
    assert start("--what", "best-constant", "--seeds", "3") == 0
    written = json.loads((folder / "sweep_best_constant.json").read_text())
    assert planned == [runs - 2, runs] and written["runs"] == len(written["rows"]) == runs
    multipliers = [(row["lr_multiplier"], row["wd_multiplier"]) for row in written["rows"]]
    rates = lr_multipliers(runs - 2)
    nearest = min(rates, key=lambda rate: abs(rate - 21.5))
    assert multipliers == [*((rate, 1.0) for rate in rates), (nearest, 10.0), (nearest, 0.1)]
    assert written["best"] == runs - 1
    assert f"cost {spent:.3g} FLOPs = {spent / 10:.2f} runs" in capsys.readouterr().out


def test_the_price_of_meta_training_has_to_be_known(start, home, monkeypatch):
    monkeypatch.setitem(PRESETS["smoke"], "sweep", {})  # without its number of settings
    with pytest.raises(UserError, match="meta-s42/result.json does not exist.*give --settings"):
        start("--what", "best-constant")


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
def test_runs_fill_the_machine(monkeypatch, preset, gpus, flags, jobs, nproc):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    args = parse_with_preset(sweep.flags(), "sweep", ["--preset", preset, "--what", "methods", *flags])
    every_run = parse_with_preset(base_train.flags(), "base_train", ["--preset", preset])
    assert find_devices(args, every_run, 8) == Devices(jobs, nproc, [str(i) for i in range(gpus)])


def test_side_by_side_runs_get_gpus_of_their_own(home, monkeypatch):
    started = []
    note = lambda command, env, **_: started.append((command[2], env["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setattr(subprocess, "Popen", note)
    job = Plan("paper", [1], 561).methods({1: None}, BEST)[0]
    devices = Devices(2, 2, ["4", "5", "6", "7"])
    devices.start(job, 0, 3), devices.start(job, 1, 3), Devices(1, 1, ["4"]).start(job, 0, 3)
    assert started == [("torch.distributed.run", "4,5"), ("torch.distributed.run", "6,7"), ("scripts.base_train", "4")]


def test_progress_shows_steps_and_time_left(home, monkeypatch, capsys):
    jobs = Plan("smoke", [1], 100).methods({1: None}, BEST)
    log = home / "runs" / jobs[1].tag / "log.jsonl"
    log.parent.mkdir(parents=True)
    whole = [json.dumps({"step": s, "loss": 1.0, "multipliers": {"*": {"lr": 1.0}}}) + "\n" for s in range(40)]
    log.write_text("".join(whole) + '{"step": 40, "lo')
    assert steps_done(jobs[1]) == 40 and steps_done(jobs[0]) == 0 and row_of(jobs[1]) is None
    clock = iter([0.0, 9.0, 10.0])
    monkeypatch.setattr(sweep_progress.time, "monotonic", lambda: next(clock))
    rows = {jobs[0].tag: {"val_bpb": 1.5, "seconds": 75.0, "recoveries": 2}}
    progress = Progress(jobs, rows, 100)
    with open(log, "a") as f:
        f.write('ss": 1.0}\n' + '{"step": 65, "loss": 1.0}\n')
    progress.status(jobs[1:2])
    progress.status(jobs[1:2])
    progress.ended(jobs[0], rows[jobs[0].tag])
    assert capsys.readouterr().out.splitlines() == [
        "1/5 done | jel-s1 66/100 | left 2m08s",
        "1/5 hand_tuned-s1: val_bpb 1.5000, 2 recoveries, 1m15s",
    ]
    assert (
        describe(Job("a/b", {"lr": 1.0}, [], []), {"val_bpb": None, "seconds": 1.0, "recoveries": 0})
        == "b lr 1.0: diverged, 1s"
    )
