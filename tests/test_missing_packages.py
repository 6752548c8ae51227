"""A machine with torch and little else: nothing is imported that a stage does not need, and tokens come as files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanochat.common import UserError, need
from nanochat.token_cache import TokenCache, epochs_line
from nanochat.tokenizer import Tokenizer
from scripts import doctor, tok_train
from tests.conftest import ROOT, run_script

ABSENT = "rustbpe schedulefree wandb matplotlib requests pyarrow tiktoken tqdm cmaes"


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, str]:
    """The environment of a machine without those packages; processes that are started from there lack them too."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT.split()!r}))\n")
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def carried(base, corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("carried") / "tokens"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        patch.setattr("sys.argv", ["", "--preset", "smoke", "--data", str(corpus), "--carry", str(folder)])
        tok_train.main()
    return folder


def test_every_program_starts_without_them(bare):
    names = "base_train base_eval meta_train sweep.__main__ report.__main__ bench.__main__ ablate tok_train doctor plan"
    program = "; ".join(f"import scripts.{name}" for name in names.split())
    command = [sys.executable, "-c", f"{program}; import rustbpe"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **bare}, text=True, capture_output=True)
    assert "rustbpe" in done.stderr.splitlines()[-1] and done.stderr.count("Error") == 1, done.stderr


def test_a_run_from_carried_tokens(carried, bare, tmp_path):
    """Tokenizer, training, validation and a sample on the bare machine."""
    flags = ["--preset", "smoke", "--data", str(carried)]
    taken = run_script(tmp_path, "scripts.tok_train", *flags, check=True, **bare)
    assert "made elsewhere" in taken.stdout
    flags += ["--num-iterations", "400", "--eval-every", "0", "--save-every", "0"]
    free = run_script(tmp_path, "scripts.base_train", *flags, "--optimizer", "schedule-free", **bare)
    assert free.returncode == 2 and "a schedule-free run needs the package schedulefree" in free.stderr
    there = run_script(tmp_path, "scripts.base_train", *flags, "--model-tag", "carried", check=True, **bare)
    assert "tokens of 3 shards, made elsewhere" in there.stdout and "sample:" in there.stdout
    assert "epochs over the same text" in there.stdout
    assert json.loads((tmp_path / "runs" / "carried" / "result.json").read_text())["val_bpb"] > 0


def test_carried_tokens_are_the_cache(carried, base, corpus, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    tokenizer = Tokenizer.load(carried)
    here, there = TokenCache.build(corpus, tokenizer), TokenCache.build(carried, tokenizer)
    for shard in range(3):
        assert np.array_equal(here.tokens(shard), there.tokens(shard))
    total = sum(len(there.tokens(shard)) for shard in there.shards("train"))
    assert there.split_tokens("train") + there.split_tokens("probe") == total
    assert epochs_line(there, total // 2) == "" and "4.0 epochs" in epochs_line(there, 4 * there.split_tokens("train"))


def test_carried_tokens_are_checked(carried, tmp_path):
    tokenizer = Tokenizer.load(carried)
    other = Tokenizer(tokenizer.pattern, tokenizer.ranks[:-1])
    with pytest.raises(UserError, match="tokens of another tokenizer"):
        TokenCache.build(carried, other)
    cache = TokenCache.build(carried, tokenizer)
    cache.carry(tokenizer, tmp_path / "again")
    (tmp_path / "again" / "shard_00001.tokens").write_bytes(b"\0\0")
    with pytest.raises(UserError, match="damaged or was not copied to the end"):
        TokenCache.build(tmp_path / "again", tokenizer)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("")
    with pytest.raises(UserError, match="holds something else"):
        cache.carry(tokenizer, tmp_path / "taken")


def test_what_is_missing_is_named_with_what_it_was_for():
    with pytest.raises(UserError, match="flying needs the package no_such_thing, which is not installed"):
        need("no_such_thing.wings", "flying")


def test_the_doctor_says_in_ten_lines_what_is_missing_and_what_that_means(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    found = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "rustbpe" else found(name))
    monkeypatch.setattr("sys.argv", ["doctor", "--json", str(tmp_path / "found.json")])
    assert doctor.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 10 and [line.split()[0] for line in lines[:3]] == ["device", "torch", "attention"]
    assert "rustbpe: no tokenizer can be trained" in next(line for line in lines if line.startswith("missing"))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor.main() == 1 and "cannot run here" in capsys.readouterr().out
