"""A command under a limit, and the first hour on a GPU, rehearsed without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import timed
from tests.conftest import ROOT

STEPS = [
    *("01_doctor", "02_tokens", "03_cuda_tests", "04_bench", "05_plan", "06_hand_tuned", "07_meta_training"),
    *("08_schedule_free", "09_constants", "10_methods", "11_report"),
]


def under_limit(seconds: float, program: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.timed", "--seconds", str(seconds), *flags, "--", sys.executable, "-c"]
    return subprocess.run([*command, program], cwd=ROOT, text=True, capture_output=True, timeout=60)


def test_the_exit_status_is_the_commands_or_75(tmp_path):
    record = str(tmp_path / "a")
    assert under_limit(20, "import sys; sys.exit(3)", "--record", record).returncode == 3
    assert json.loads((tmp_path / "a.json").read_text())["outcome"] == "failed"
    done = under_limit(20, "print('said')", "--record", record)
    assert done.returncode == 0 and "said" in done.stdout and "said" in (tmp_path / "a.txt").read_text()
    assert "done before" in under_limit(20, "print('again')", "--record", record).stdout
    # a run that saves when asked: it leaves by itself, within the grace, and its last words are kept
    saves = "import signal, sys, time\ndef save(*_):\n print('saved'); sys.exit(75)\n"
    saves += "signal.signal(signal.SIGTERM, save); print('begun', flush=True); time.sleep(60)"
    cut = under_limit(1.0, saves, "--record", str(tmp_path / "b"))
    assert cut.returncode == 75 and "saved" in (tmp_path / "b.txt").read_text()
    assert timed.summary(tmp_path) == 75
    (tmp_path / "a.json").unlink()
    outcomes = {r["step"]: r["outcome"] for r in json.loads((tmp_path / "summary.json").read_text())["steps"]}
    assert outcomes == {"a": "done", "b": "cut"}
    begin = time.monotonic()
    late = [sys.executable, "-m", "scripts.timed", "--until", "1", "--", "sleep", "60"]
    assert subprocess.run(late, cwd=ROOT).returncode == 75 and time.monotonic() - begin < 10


def first_hour(out: Path, minutes: int) -> subprocess.CompletedProcess:
    environment = {**os.environ, "MINUTES": str(minutes), "PYTHON": sys.executable, "PRESET": "smoke"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", "scripts/first_gpu_hour.sh", str(out)]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=1800)


def outcomes(out: Path) -> dict[str, str]:
    return {step: json.loads((out / f"{step}.json").read_text())["outcome"] for step in STEPS}


def test_every_step_that_is_cut_leaves_its_record(tmp_path):
    done = first_hour(tmp_path, 0)
    assert done.returncode == 75, done.stdout + done.stderr
    assert set(outcomes(tmp_path).values()) == {"cut"} and all((tmp_path / f"{s}.txt").exists() for s in STEPS)
    assert [r["step"] for r in json.loads((tmp_path / "summary.json").read_text())["steps"]] == STEPS


@pytest.mark.slow
def test_the_first_hour_at_smoke_cut_once_and_gone_on_with(tmp_path):
    first_hour(tmp_path, 0)
    done = first_hour(tmp_path, 30)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert set(outcomes(tmp_path).values()) == {"done"}
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert all(len(method["test_bpb"]) == 1 for method in results["methods"].values()) and len(results["methods"]) == 5
    rows = json.loads((tmp_path / "report" / "bench.json").read_text())["rows"]
    assert any("32 episodes" in row["what"] for row in rows) and (tmp_path / "doctor.json").exists()
    again = first_hour(tmp_path, 30)
    assert again.returncode == 0 and again.stdout.count("done before") == len(STEPS)
