"""The presets name real flags, and the paper's numbers stand on the argparse lines."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch

from nanochat.common import UserError
from scripts import base_train, meta_train, presets
from scripts.sweep import __main__ as sweep

SCRIPTS = {
    "base_train": base_train.flags,
    "meta_train": meta_train.flags,
    "sweep": lambda: with_required(sweep.flags()),
}
README = (Path(__file__).parent.parent / "README.md").read_text()


def with_required(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    for action in parser._actions:
        action.required = False
    return parser


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_presets_name_flags_and_flags_win(preset, script):
    args = presets.parse_with_preset(SCRIPTS[script](), script, ["--preset", preset, "--data", "given"])
    listed = presets.PRESETS[preset]
    expected = {**listed.get(script, {}), **listed.get(f"{script} --recipe jel", {})}  # jel is the default recipe
    assert all(getattr(args, key) == value for key, value in expected.items() if key != "data")
    assert args.data == "given" and args.preset == preset


def test_a_preset_with_an_unknown_key_is_refused(monkeypatch):
    monkeypatch.setitem(presets.PRESETS["smoke"], "base_train", {"no_such_flag": 1})
    with pytest.raises(UserError, match="no_such_flag"):
        presets.parse_with_preset(base_train.flags(), "base_train", ["--preset", "smoke"])


def test_seeds_and_test_tokens_of_the_presets(monkeypatch, capsys):
    seeds, tokens = {}, {}
    for preset in presets.PRESETS:
        monkeypatch.setattr("sys.argv", ["presets", preset])
        presets.main()
        name, _, *listed = capsys.readouterr().out.split()
        assert name == preset
        seeds[preset] = [int(seed) for seed in listed]
        tokens[preset] = presets.parse_with_preset(base_train.flags(), "base_train", ["--preset", preset]).test_tokens
    five = [42, 43, 44, 45, 46]
    assert seeds == {"paper": [42, 43, 44], "tiny": five, "small": five, "smoke": [42]}
    assert tokens == {"paper": 20 * 524288, "tiny": 65536, "small": 65536, "smoke": 1024}
    monkeypatch.setattr("sys.argv", ["presets", "huge"])
    with pytest.raises(UserError, match="there is no preset 'huge'"):
        presets.main()


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without a GPU, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(presets, "Path", lambda path: Path("/nowhere") / path.lstrip("/"))
    monkeypatch.setattr(presets.shutil, "which", lambda tool: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_auto_is_tiny_without_a_gpu_and_paper_with_one(no_gpu, monkeypatch):
    assert presets.resolve_preset("auto") == "tiny"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert presets.resolve_preset("auto") == "paper"


@pytest.mark.parametrize("sign", ["device file", "nvidia-smi", "CUDA_VISIBLE_DEVICES"])
def test_a_gpu_that_torch_does_not_see_is_no_reason_for_tiny(no_gpu, monkeypatch, tmp_path, sign):
    if sign == "device file":
        monkeypatch.setattr(presets, "Path", lambda path: tmp_path)
    elif sign == "nvidia-smi":
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\necho 'GPU 0: some model'\n")
        tool.chmod(0o755)
        monkeypatch.setattr(presets.shutil, "which", lambda name: str(tool))
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match="this machine has a GPU .* torch .* does not see it; .* --preset tiny"):
        presets.resolve_preset("auto")
    assert presets.resolve_preset("tiny") == "tiny"  # asked for
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert presets.resolve_preset("auto") == "tiny"


@pytest.mark.parametrize("output", ["exit 9", "echo 'No devices found'"])
def test_nvidia_smi_without_a_gpu_is_no_evidence(no_gpu, monkeypatch, tmp_path, output):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{output}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(presets.shutil, "which", lambda name: str(tool))
    assert presets.resolve_preset("auto") == "tiny"


def test_the_paper_preset_is_table_2():
    a = presets.parse_with_preset(meta_train.flags(), "meta_train", ["--preset", "paper", "--recipe", "paper"])
    assert (a.policy_hidden, a.policy_lr, a.initial_log_std, a.action_range) == (64, 3e-4, -0.5, 100)
    assert (a.gamma, a.clip, a.entropy_coef, a.ppo_epochs, a.minibatch_size) == (0.99, 0.2, 0.0, 4, 64)
    assert (a.decision_interval, a.num_iterations, a.updates, a.episodes) == (50, 561, 50, 8)
    assert (a.probe_batches, a.gradient_penalty, a.smoothness_penalty) == (4, 0.0, 0.0)
    assert a.episode_seq_len == 128 and a.episode_seq_len * a.episode_batch_size == 4096
    b = presets.parse_with_preset(base_train.flags(), "base_train", ["--preset", "paper"])
    assert (b.depth, b.total_batch_size, b.max_seq_len, b.warmdown_ratio) == (6, 524288, 2048, 0.4)
    assert (b.base_lr, b.base_wd, b.sf_lr, b.sf_wd, b.sf_warmup) == (1e-3, 1e-2, 2.0, 0.0, 0)
    assert round(b.target_param_data_ratio * 73_531_692 / b.total_batch_size) == 561


def test_every_command_in_the_readme_parses():
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^python -m scripts\.(.*)$", README, re.M)]
    assert commands
    for script, *flags in commands:
        if script in SCRIPTS:
            presets.parse_with_preset(SCRIPTS[script](), script, flags)
        else:
            assert importlib.util.find_spec(f"scripts.{script}")
