"""scripts.base_eval: a saved run is evaluated as it was trained, on the splits that are asked for."""

from __future__ import annotations

import re

import pytest
import torch

from nanochat.checkpoint import load_model_weights, save_weights
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer
from scripts.base_eval import load_run
from tests.conftest import run_script


@pytest.fixture(scope="module")
def run(base, corpus):
    """A schedule-free run of a few steps."""
    flags = ["--preset", "smoke", "--data", str(corpus), "--num-iterations", "4", "--optimizer", "schedule-free"]
    run_script(base, "scripts.base_train", *flags, "--model-tag", "evaluated", check=True)
    return base / "runs" / "evaluated"


def test_bits_per_byte_of_every_split_that_is_asked_for(base, run):
    flags = ["--model-tag", "evaluated", "--eval-tokens", "1024", "--max-tokens", "1", "--device-batch-size", "2"]
    found = {}
    for splits in (["train", "val"], ["val", "test"]):
        asked = [] if splits[0] == "train" else ["--splits", *splits]
        done = run_script(base, "scripts.base_eval", *flags, *asked, check=True)
        lines = re.findall(r"^(\w+) bpb (\d+\.\d+) over 1,024 tokens$", done.stdout, re.MULTILINE)
        assert [split for split, _ in lines] == splits
        for split, bpb in lines:
            assert found.setdefault(split, bpb) == bpb
    assert len(set(found.values())) == 3  # train, val and test are different text
    assert run_script(base, "scripts.base_eval", *flags, "--splits", "dev").returncode == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_is_rounded(base, run, tmp_path, monkeypatch, dtype):
    """`init_weights` may choose bf16 embeddings; a schedule-free run's are fp32, so its choice must play no part."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setattr(GPT, "init_weights", None)
    weights = load_model_weights(run / "model.safetensors")
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].to(dtype)
    save_weights(tmp_path / "model.safetensors", weights, {})
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    model, tokenizer, data = load_run(tmp_path, torch.device("cpu"))
    assert isinstance(tokenizer, Tokenizer) and not model.training and data
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, weights[name].float())
    with torch.no_grad():
        assert model(torch.arange(8)[None]).isfinite().all()
