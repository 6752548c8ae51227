"""Shared by all tests: one thread, and a small prepared base directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; Triton reads this when it is first imported
settings.register_profile("suite", derandomize="EXAMPLES" not in os.environ)  # the same examples in every run
settings.load_profile("suite")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Three small shards of real text: the project's sources."""
    folder = tmp_path_factory.mktemp("corpus")
    text = "\n".join(p.read_text() for p in sorted(ROOT.glob("nanochat/*.py")))
    documents = [text[i : i + 400] for i in range(0, 120_000, 400)]
    for shard, part in enumerate((documents[:140], documents[140:280], documents[280:])):
        pq.write_table(pa.table({"text": part}), folder / f"shard_{shard:05d}.parquet")
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory, corpus) -> Path:
    """A base directory with the smoke tokenizer trained on `corpus`."""
    base = tmp_path_factory.mktemp("base")
    run_script(base, "scripts.tok_train", "--preset", "smoke", "--data", str(corpus), check=True)
    return base


def run_script(base: Path, module: str, *flags: str, check: bool = False, **env) -> subprocess.CompletedProcess:
    """`python -m module flags` in a process of its own, with `base` as the base directory."""
    result = subprocess.run(
        [sys.executable, "-m", module, *flags],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=240,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", **env},
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folder of synthetic runs of preset tiny, with everything measured, for the report's tests."""
    from tests.report_runs import add_everything  # here, so that other tests do not wait for matplotlib

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = tmp_path / "runs" / "tiny"
    add_everything(folder)
    return folder
