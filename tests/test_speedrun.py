"""The main job from end to end, at the size that takes a minute."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
METHODS = {"hand_tuned", "jel", "best_constant", "schedule_free", "suboptimal"}


@pytest.mark.slow
def test_the_main_job_leaves_its_report_and_a_second_start_does_nothing_again(tmp_path):
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path)}

    def speedrun() -> dict[Path, int]:
        subprocess.run(["bash", "speedrun.sh", "--preset", "smoke"], cwd=ROOT, env=environment, check=True)
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}

    models = speedrun()
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert set(results["methods"]) == METHODS and results["meta"]["updates"] == 3
    for method in results["methods"].values():
        assert len(method["test_bpb"]) == 1 and 0 < method["test_bpb"][0] < 10
    assert "<svg" in (html := (tmp_path / "report" / "report.html").read_text()) or "data:image" in html
    assert models and speedrun() == models
