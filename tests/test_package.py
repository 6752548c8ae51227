"""The wheel carries jel alone, and what the documents promise works with it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(*command, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def snippets(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), re.S | re.M)


def test_importing_jel_is_quick_beyond_torch_and_numpy():
    """Processor seconds, which a busy machine does not stretch."""
    code = "import time, torch, numpy; t = time.process_time(); import jel; print(time.process_time() - t)"
    assert min(float(run(sys.executable, "-c", code, cwd=ROOT)) for _ in range(2)) < 0.2


def test_the_snippets_of_the_scheduler_work_as_they_stand():
    found = snippets(ROOT / "docs" / "scheduler.md")
    assert len(found) == 2
    for code in found:
        exec(compile(code, "docs/scheduler.md", "exec"), names := {"__name__": "snippet"})
    cases = names["TestHalving"]()
    for name in dir(cases):
        if name.startswith("test_"):
            getattr(cases, name)()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("jel", "nanochat", "scripts", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    run(*build, folder, source)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_carries_jel_alone(wheel):
    assert wheel.name.startswith("just_enough_learning-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        about = next(name for name in names if name.endswith("METADATA"))
        metadata = Parser().parsestr(archive.read(about).decode())
    assert {name.split("/")[0] for name in names} == {"jel", about.split("/")[0]}
    assert {"jel/py.typed", "jel/policies/default.safetensors", "jel/policies/default.json"} <= set(names)
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.match(r"[a-z]+", line)[0] for line in needed) == ["numpy", "safetensors", "torch"]


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(wheel, tmp_path):
    """In a virtual environment that has the wheel and, from this one, torch, numpy and safetensors."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    where = run(python, "-c", "import jel; print(jel.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(site)
    for i, code in enumerate(snippets(ROOT / "docs" / "scheduler.md")):
        (tmp_path / f"snippet_{i}.py").write_text(code)
        run(python, f"snippet_{i}.py", cwd=tmp_path)
    shown = run(tmp_path / "env" / "bin" / "jel", "show", "default", cwd=tmp_path)
    assert "wte.lr" in shown
    run(python, "-m", "jel", "export", "default", "--out", "s.csv", cwd=tmp_path)
    loaded = "import sys, jel; print([m for m in sys.modules if m.split('.')[0] in ('nanochat', 'scripts', 'wandb')])"
    assert run(python, "-c", loaded, cwd=tmp_path).strip() == "[]"
