"""scripts.meta_train from outside: deaths and stops leave no trace, ranks change nothing, bad input is one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jel.errors import JelError
from jel.policy import load_policy
from nanochat.common import UserError
from nanochat.preemption import REQUEUE_EXIT_CODE
from nanochat.run_log import read_log
from scripts import meta_train
from tests.conftest import ROOT

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(scope="module")
def smoke(corpus):
    return [
        "--preset",
        "smoke",
        "--data",
        str(corpus),
        "--device-type",
        "cpu",
        "--updates",
        "4",
        "--episodes",
        "3",
        "--resume",
        "auto",
        "--episode-workers",
        "1",
    ]


@pytest.fixture
def train(base, smoke, monkeypatch):
    """meta_train in this process; its exit code."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))

    def run(tag, *flags):
        monkeypatch.setattr(sys, "argv", ["meta_train", *smoke, "--model-tag", tag, *flags])
        return meta_train.main()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def undisturbed(base, train):
    """What is left by the run that nothing happens to."""
    assert train("meta-whole") == 0
    return left(base, "meta-whole")


def left(base, tag):
    """The policy's bytes, and the log and the result without their seconds and paths."""
    folder = base / "runs" / tag
    log = [{k: v for k, v in record.items() if k != "seconds"} for record in read_log(folder)]
    result = json.loads((folder / "result.json").read_text())
    return (
        (folder / "policy.safetensors").read_bytes(),
        log,
        {k: result[k] for k in ("updates", "entropy", "return_mean", "tokens")},
    )


def started(base, smoke, tag, *launcher):
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "scripts.meta_train", *smoke, "--model-tag", tag],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"},
    )


def after_updates(base, tag, number: int, process) -> None:
    """Wait until so many updates are logged and saved, and the next one is under way."""
    deadline, saved = time.monotonic() + 60, base / "runs" / tag / "checkpoints" / f"step_{number:08d}"
    while len(read_log(base / "runs" / tag)) < number or not saved.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)


def test_killed_and_stopped_and_resumed_is_undisturbed(base, smoke, train, undisturbed, capsys):
    killed = started(base, smoke, "meta-torn")
    after_updates(base, "meta-torn", 1, killed)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL and not (base / "runs" / "meta-torn" / "result.json").exists()

    stopped = started(base, smoke, "meta-torn")
    after_updates(base, "meta-torn", 2, stopped)
    stopped.send_signal(signal.SIGTERM)
    printed = stopped.communicate(timeout=60)[0]
    assert stopped.returncode == REQUEUE_EXIT_CODE and "resumed at update 1" in printed, printed
    done = len(read_log(base / "runs" / "meta-torn"))
    assert f"stopped after update {done}" in printed and done < 4, printed

    assert train("meta-torn") == 0 and f"resumed at update {done}" in capsys.readouterr().out
    assert left(base, "meta-torn") == undisturbed
    before = (base / "runs" / "meta-torn" / "policy.safetensors").stat().st_mtime_ns
    assert train("meta-torn") == 0 and "already finished" in capsys.readouterr().out
    assert (base / "runs" / "meta-torn" / "policy.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="--policy-lr 0.01 -> 0.1"):
        train("meta-torn", "--policy-lr", "0.1")


def test_two_ranks_are_one_and_episodes_may_be_odd(base, smoke, undisturbed):
    """Three episodes on two ranks, side by side on neither: the ranks have a different number of rounds to do."""
    pair = started(
        base,
        [*smoke, "--episode-chunk", "1"],
        "meta-pair",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
    )
    printed = pair.communicate(timeout=120)[0]
    assert pair.returncode == 0, printed
    assert left(base, "meta-pair") == undisturbed


def test_two_processes_are_one(base, train, undisturbed):
    assert train("meta-workers", "--episode-workers", "2") == 0
    assert left(base, "meta-workers") == undisturbed


def test_what_it_leaves_is_a_policy_with_its_card(base, undisturbed):
    policy, card = load_policy(base / "runs" / "meta-whole" / "policy")
    assert policy.observes == {"progress"} and card["training"]["flags"]["updates"] == 4
    assert card["training"]["decay_carry"] == 12 * 2 * 32  # tokens of an episode: the policy has no knob for decay
    log = undisturbed[1]
    assert [record["step"] for record in log] == [0, 1, 2, 3] and all(len(record["returns"]) == 3 for record in log)
    assert all({len(m) for m in record["multipliers"]["*"].values()} == {3} for record in log)
    assert all(record["decision_progress"] == [0, 4 / 12, 8 / 12] for record in log)
    result = json.loads((base / "runs" / "meta-whole" / "result.json").read_text())
    assert result["episodes"] == 12 and result["tokens"] == 12 * 12 * 2 * 32
    assert result["probe_tokens"] == 12 * 4 * 4 * 2 * 32  # 4 batches before each of 3 decisions, and at the end
    assert result["flops"] > 0 and result["core_seconds"] >= result["seconds"] > 0
    assert undisturbed[2]["entropy"] == [record["entropy"] for record in log]


@pytest.mark.parametrize("method, readings", [("random", 12 * 4), ("halving", 2 * (9 * 2 + 3 * 4))])
def test_a_search_is_charged_what_it_trained(base, train, method, readings):
    """Smoke's episodes have 3 decisions in 12 steps: a bracket is 9 candidates for one decision, then 3 for all."""
    if method == "halving":
        pytest.importorskip("optuna")
    assert train(f"meta-{method}", "--method", method) == 0
    result = json.loads((base / "runs" / f"meta-{method}" / "result.json").read_text())
    assert result["tokens"] == 12 * 12 * 2 * 32 and result["probe_tokens"] == readings * 4 * 2 * 32
    policy, _ = load_policy(base / "runs" / f"meta-{method}" / "policy")
    assert policy.observes == {"progress"}


def test_searches_share_a_file(base, train):
    pytest.importorskip("optuna")
    shared = "--method", "halving", "--updates", "2", "--shared-search", str(base / "search.journal")
    assert train("meta-share-a", *shared, "--seed", "1") == train("meta-share-b", *shared, "--seed", "2") == 0
    assert train("meta-alone", *shared[:4], "--seed", "2") == 0
    assert left(base, "meta-alone")[1] != left(base, "meta-share-b")[1]  # it heard of the first


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--shared-search", "here.journal"), "--shared-search is for the searches"),
        (("--updates", "0"), "--updates is 0; it must be at least 1"),
        (("--episodes", "-1"), "--episodes is -1"),
        (("--episode-workers", "0"), "--episode-workers is 0"),
        (("--episode-workers", "2", "--episode-seq-len", "100000"), "too little text"),
        (("--policy-hidden", "5000"), "hidden"),
        (("--initial-log-std", "nan"), "initial_log_std is nan"),
        (("--action-range", "1"), "action_range is 1.0"),
        (("--action-range", "0"), "action_range is 0.0"),
        (("--action-range", "nan"), "action_range is nan"),
        (("--tokenizer", "absent"), "tok_train"),
        (("--data", "/nowhere"), "/nowhere"),
        (("--model-tag", "../out"), "does not name a folder"),
        (("--episode-seq-len", "100000"), "too little text"),
    ],
)
def test_bad_input_is_one_clear_line(train, flags, words):
    with pytest.raises((UserError, JelError), match=words):
        train("meta-bad", *flags)
