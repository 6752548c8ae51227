"""scripts.base_train from outside: the hook, exact resume, and one clear line for bad input."""

from __future__ import annotations

import json
import math
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import safetensors.torch
import torch

from jel.controller import Controller
from jel.knobs import Knob
from jel.policy import GaussianPolicy, save_policy
from nanochat.checkpoint import load_checkpoint
from nanochat.common import Compute, UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.run_log import MEASURED
from scripts import base_train
from scripts.presets import parse_with_preset
from scripts.run_state import Cost
from tests.conftest import run_script

SMOKE = ("--preset", "smoke", "--eval-every", "4", "--device-type", "cpu")


class Doubler(Controller):
    """A controller of a user's own: it watches everything there is, and counts its decisions."""

    observes = frozenset({"progress", "step", "train_loss", "probe_loss", "grad_norm"})

    def __init__(self):
        self.seen = []

    def decide(self, observation):
        self.seen.append(dict(observation))
        return {"*": {"lr": 2.0 ** len(self.seen), "weight_decay": 1.0}, "lm_head": {"lr": 0.5}}

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


class Identity(Controller):
    def decide(self, observation):
        return {"*": {"lr": 1.0, "weight_decay": 1.0}}


class Corrected(Controller):
    """A rate of its own for one group."""

    own = {"lr": 8.0}

    def decide(self, observation):
        return {"*": {"lr": 4.0}, "lm_head": self.own}


class Even(Corrected):
    own = {"lr": 8.0, "weight_decay": 0.5}


@pytest.fixture(scope="module")
def train(base, corpus):
    def run(tag, *flags, **env):
        return run_script(base, "scripts.base_train", *SMOKE, "--data", str(corpus), "--model-tag", tag, *flags, **env)

    return run


def weights(base, tag):
    return safetensors.torch.load_file(base / "runs" / tag / "model.safetensors")


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_its_record(base, train):
    done = train("plain")
    assert done.returncode == 0, done.stderr
    folder = base / "runs" / "plain"
    config, result = (json.loads((folder / f"{n}.json").read_text()) for n in ("config", "result"))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert config["environment"]["torch"] == torch.__version__ and config["flags"]["num_iterations"] == 12
    assert [r["step"] for r in log if "loss" in r] == list(range(12))
    validations = [r["val_bpb"] for r in log if "val_bpb" in r]
    assert [r["step"] for r in log if "val_bpb" in r] == [0, 4, 8, 12] and validations[-1] == result["val_bpb"]
    assert validations[-1] < validations[0]
    assert log[-1] == {"step": 12, "test_bpb": result["test_bpb"]}  # read last, and once
    assert "sample:" in done.stdout and "step 00011/00012 | loss" in done.stdout
    assert list(result) == [
        *("val_bpb", "test_bpb", "train_loss", "seconds", "core_seconds", "flops", "decisions", "controller_seconds"),
        *("steps", "tokens", "recoveries", "flags"),
    ]
    assert (result["steps"], result["tokens"], result["decisions"], result["recoveries"]) == (12, 12 * 256, 0, 0)
    assert result["seconds"] == pytest.approx(sum(r["dt"] for r in log if "loss" in r))
    assert result["core_seconds"] == result["seconds"] * config["environment"]["threads"]
    with torch.device("meta"):
        per_token = GPT(GPTConfig(**config["model"])).flops_per_token()
    assert result["flops"] == pytest.approx(per_token * (12 * 256 + (4 + 1) * 1024 / 3))  # 4 validations, 1 test


def test_the_test_split_is_read_only_if_asked_for_and_minus_one_is_off(base, train):
    assert train("choosing", "--test-tokens", "0", "--eval-every", "-1", "--max-seq-len", "32").returncode == 0
    folder = base / "runs" / "choosing"
    result, log = json.loads((folder / "result.json").read_text()), (folder / "log.jsonl").read_text()
    assert result["test_bpb"] is None and "test_bpb" not in log and log.count("val_bpb") == 1
    assert not list((base / "data").rglob("plan_test_32_*"))


def test_a_decision_uses_what_is_known_before_the_step(base, train):
    """Before the first step nothing was observed; later, the loss and the gradient of the step before."""
    flags = ("--controller", "tests.test_base_train:Doubler", "--decision-interval", "2", "--save-every", "11")
    assert train("watched", *flags).returncode == 0
    folder = base / "runs" / "watched"
    losses = [r["loss"] for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in r]
    seen = load_checkpoint(folder / "checkpoints")[1]["controller"]["seen"]
    assert [s["step"] for s in seen] == [0, 2, 4, 6, 8, 10] and [s["progress"] for s in seen][3] == 0.5
    assert math.isnan(seen[0]["train_loss"]) and math.isnan(seen[0]["grad_norm"])
    assert [s["train_loss"] for s in seen[1:]] == losses[1:11:2]
    assert all(s["grad_norm"] > 0 for s in seen[1:]) and all(s["probe_loss"] > 0 for s in seen)
    result = json.loads((folder / "result.json").read_text())
    assert result["decisions"] == 6 and 0 < result["controller_seconds"] < result["seconds"]


@pytest.mark.parametrize(
    "steps, total",
    [
        ([(9.0, True), (7.0, True), (1.0, False), (3.0, False)], 8.0),  # what compiled is charged at the mean
        ([(1.0, False), (3.0, False)], 4.0),
        ([(9.0, True), (7.0, True)], 16.0),  # nothing else was measured
        ([], 0.0),
    ],
)
def test_seconds_leave_out_compilation(steps, total):
    cost = Cost()
    for seconds, warm_up in steps:
        cost.add_step(seconds, warm_up)
    two_gpus = cost.total(256, 6.0, Compute(0, 2, torch.device("cuda")))
    assert (two_gpus["seconds"], two_gpus["core_seconds"]) == (total, 2 * total)
    again = Cost()
    again.load_state_dict(json.loads(json.dumps(asdict(cost))))
    assert again == cost
    with pytest.raises(ValueError, match="its seconds is nan"):
        again.load_state_dict({**asdict(cost), "seconds": math.nan})


def test_identity_and_none_give_the_same_bits(base, train):
    assert train("none").returncode == 0
    assert train("identity", "--controller", "tests.test_base_train:Identity").returncode == 0
    assert_same(weights(base, "none"), weights(base, "identity"))
    assert train("doubled", "--controller", "tests.test_base_train:Doubler").returncode == 0
    assert not torch.equal(weights(base, "none")["lm_head.weight"], weights(base, "doubled")["lm_head.weight"])


def test_weight_decay_is_carried_from_episodes_to_the_run(base, train, tmp_path):
    assert train("carried", "--hparams", "uniform", "--decay-carry", "192").returncode == 0  # of 12 x 256 tokens
    assert train("raised", "--hparams", "uniform", "--base-wd", "0.04").returncode == 0
    assert_same(weights(base, "carried"), weights(base, "raised"))
    uneven = "--hparams", "uniform", "--base-wd", "1.0", "--controller", "tests.test_base_train:Corrected"
    assert train("corrected", *uneven, "--decay-carry", "3072").returncode == 0  # x 1: only rate x decay is evened out
    assert train("even", *uneven[:-1], "tests.test_base_train:Even").returncode == 0
    assert train("uneven", *uneven).returncode == 0
    assert_same(weights(base, "corrected"), weights(base, "even"))
    assert not torch.equal(weights(base, "uneven")["lm_head.weight"], weights(base, "even")["lm_head.weight"])
    save_policy(GaussianPolicy([Knob("lr", "lr")]), tmp_path / "p", {"decay_carry": 192})
    for flags, carried in (("--hparams uniform", 192), ("--hparams uniform --decay-carry 0", 0), ("", 0)):
        given = f"--preset smoke --controller jel --policy {tmp_path / 'p'} {flags}"
        assert base_train.parse(given.split())[0].decay_carry == carried


@pytest.mark.parametrize(
    "method",
    [
        (),
        ("--hparams", "uniform", "--controller", "jel"),
        ("--optimizer", "schedule-free"),
        ("--controller", "tests.test_base_train:Doubler"),
    ],
)
def test_killed_and_resumed_is_undisturbed(base, train, method):
    """Train 12 = train to a checkpoint, lose everything else, load it in a fresh process, train on."""
    assert train("whole", *method, "--save-every", "5").returncode == 0
    expected, log = weights(base, "whole"), (base / "runs" / "whole" / "log.jsonl").read_text()
    folder = base / "runs" / "torn"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base / "runs" / "whole", folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000010")
    for name in ("result.json", "model.safetensors"):
        (folder / name).unlink()
    again = train("torn", *method, "--save-every", "5", "--resume", "auto")
    assert again.returncode == 0 and "resumed at step 5" in again.stdout, again.stdout + again.stderr
    assert_same(weights(base, "torn"), expected)

    def timeless(text):
        return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in text.splitlines()]

    assert timeless((folder / "log.jsonl").read_text()) == timeless(log)
    assert "already finished" in train("torn", *method, "--save-every", "5", "--resume", "auto").stdout


def test_micro_batches_change_nothing(base, train):
    """Without scalars: x0_lambdas begin with a gradient of rounding errors, which AdamW makes a full step of."""
    for tag, rows in (("whole-batch", "4"), ("micro", "1")):
        assert train(tag, "--device-batch-size", rows, "--scalar-lr", "0").returncode == 0
    a, b = (json.loads((base / "runs" / t / "result.json").read_text()) for t in ("whole-batch", "micro"))
    assert abs(a["train_loss"] - b["train_loss"]) < 1e-4


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--total-batch-size", "200"), ("does not divide", "nearest that does is 256")),
        (("--decision-interval", "0"), ("--decision-interval is 0",)),
        (("--eval-every", "-2"), ("--eval-every is -2",)),
        (("--decay-carry", "-1"), ("--decay-carry is -1",)),
        (("--decay-carry", "99"), ("--decay-carry is for --hparams uniform",)),
        (("--no-such-flag", "1"), ("unrecognized arguments",)),
        (("--controller", "jel", "--policy", "/nowhere/policy"), ("policy", "does not exist")),
        (("--controller", "no.such.module:Thing"), ("no.such.module",)),
        (("--controller", "json:JSONDecoder"), ("decide",)),
        (("--data", "/nowhere"), ("/nowhere",)),
        (("--tokenizer", "absent"), ("tokenizer", "tok_train")),
        (("--window-pattern", "SXL"), ("SXL",)),
        (("--model-tag", "../../escape"), ("escape",)),
        (("--hparams", "uniform", "--base-lr", "1e30", "--max-recoveries", "0"), ("diverged", "--max-recoveries is 0")),
    ],
)
def test_bad_input_is_one_clear_line(train, flags, words):
    result = train("bad", *flags)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert all(word in result.stderr.strip().splitlines()[-1] for word in words), result.stderr


def test_a_late_decision_interval_warns(train):
    result = train("late", "--controller", "tests.test_base_train:Identity", "--decision-interval", "50")
    assert result.returncode == 0 and "warning: a decision every 50 steps" in result.stdout


def test_resume_with_other_flags_is_refused(base, train):
    assert train("flagged").returncode == 0
    before = (base / "runs" / "flagged" / "result.json").read_bytes()
    result = train("flagged", "--resume", "auto", "--matrix-lr", "0.5")
    assert result.returncode == 2 and "--matrix-lr 0.02 -> 0.5" in result.stderr
    assert (base / "runs" / "flagged" / "result.json").read_bytes() == before


def test_ranks_observe_in_one_order(train):
    """Two observations are collective, and a set of names has another order in every process: seeds 0 and 1 differ."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    flags = (
        "--controller",
        "tests.test_base_train:Doubler",
        "--num-iterations",
        "3",
        "--decision-interval",
        "1",
        "--device-batch-size",
        "1",
        "--save-every",
        "0",
    )
    with ThreadPoolExecutor(2) as pool:
        ranks = [
            pool.submit(train, "observers", *flags, RANK=str(rank), PYTHONHASHSEED=str(rank), **address)
            for rank in range(2)
        ]
        for rank in ranks:
            assert rank.result().returncode == 0, rank.result().stderr


# -----------------------------------------------------------------------------
# length


def lengths(*flags) -> tuple[int, int]:
    args = parse_with_preset(base_train.flags(), "base_train", ["--preset", "paper", *flags])
    base_train.check_flags(args)
    with torch.device("meta"):
        return base_train.derive_length(args, GPT(GPTConfig.from_depth(6)), 1)


def test_the_length_of_a_run_and_its_formula(capsys):
    assert lengths() == (561, 8)
    assert "= 5.2e+16 FLOPs; steps: 4 tokens per parameter x 73,531,692 / 524,288 a step" in capsys.readouterr().out
    assert lengths("--target-flops", "5.2e16")[0] == 561
    assert "steps: --target-flops 5.2e+16 / 9.28e+13 a step" in capsys.readouterr().out
    assert lengths("--num-iterations", "7")[0] == 7
    assert "steps: --num-iterations" in capsys.readouterr().out
    assert lengths("--num-iterations", "7", "--target-flops", "1e15")[0] == round(1e15 / 9.28e13)
    assert lengths("--target-flops", "1")[0] == 1
    for wrong in ("0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match="--target-flops is"):
            lengths("--target-flops", wrong)
