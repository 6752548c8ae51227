"""Damaged files and random flags: each is used, or refused with an error message of one line; no traceback, no hang."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jel import apply_multipliers
from jel.errors import JelError
from jel.policy import GaussianPolicy, files_digest, load_policy, policy_files, save_policy
from jel.schedule import ScheduleController, export_schedule, load_schedule
from nanochat.checkpoint import load_checkpoint, save_checkpoint
from nanochat.common import UserError, run_main
from nanochat.dataset import iter_texts, split_shards
from nanochat.run_log import read_log
from nanochat.tokenizer import Tokenizer
from scripts import base_eval, base_train, meta_train
from scripts.sweep import __main__ as sweep
from scripts.sweep import runs as sweep_runs

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.just(10**400),
    st.just([]),
    st.just({}),
    st.lists(st.floats(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)
BYTES = st.tuples(st.sampled_from(["flip", "cut", "insert", "all"]), st.floats(0, 1), st.binary(min_size=1, max_size=8))
CHANGE = st.tuples(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=6), st.sampled_from(["set", "set", "drop", "add"]), JUNK
)


def examples(number: int):
    """Hypothesis settings for so many examples; EXAMPLES=20 tries 20 times as many, different ones in every run."""
    return settings(
        max_examples=number * int(os.environ.get("EXAMPLES", "1")),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@contextlib.contextmanager
def only_expected_errors(seconds: int = 20):
    """The body succeeds, or raises one of the project's own errors, with a message of one line, in so many seconds."""

    def timed_out(*_):
        raise AssertionError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, timed_out)
    signal.alarm(seconds)
    try:
        yield
    except (UserError, JelError) as e:
        assert str(e) and len(str(e).splitlines()) == 1, str(e)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutated(data: bytes, change) -> bytes:
    """The bytes with some overwritten, cut off, inserted, or all replaced; `change` is drawn from BYTES."""
    how, where, junk = change
    at = int(where * (len(data) - 1))
    if how == "flip":
        return data[:at] + junk + data[at + len(junk) :]
    return {"cut": data[:at], "insert": data[:at] + junk + data[at:], "all": junk}[how]


def altered(whole, change):
    """A copy of a JSON-like tree with one entry set to junk, removed or added, or sometimes junk in place of the tree.

    `change` is drawn from CHANGE.
    """
    path, how, junk = change
    if path[0] % 20 == 0:
        return junk
    whole = copy.deepcopy(whole)
    tree = whole
    for depth, i in enumerate(path):
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        if not keys:
            break
        key = keys[i % len(keys)]
        if isinstance(tree[key], (dict, list)) and depth < len(path) - 1:
            tree = tree[key]
        else:
            if how == "drop":
                del tree[key]
            elif how == "add" and isinstance(tree, dict):
                tree["junk"] = junk
            else:
                tree[key] = junk
            break
    return whole


# -----------------------------------------------------------------------------
# policies and schedules


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "p"
    save_policy(GaussianPolicy(seed=1, hidden=8), path, {"seed": 1})
    return path


@examples(150)
@given(file=st.booleans(), change=BYTES)
def test_policies_with_damaged_bytes(policy, tmp_path, file, change):
    for path, is_mutated in zip(policy_files(policy), (file, not file)):
        (tmp_path / path.name).write_bytes(mutated(path.read_bytes(), change) if is_mutated else path.read_bytes())
    with only_expected_errors():
        load_policy(tmp_path / "p")


@examples(150)
@given(change=CHANGE, data=BYTES)
def test_policies_with_a_matching_hash_but_hostile_values(policy, tmp_path, change, data):
    """The card's values are hostile, and its hash matches hostile weights."""
    weights, card = policy_files(policy)
    hostile = altered(json.loads(card.read_text()), change)
    raw = mutated(weights.read_bytes(), data) if data[1] < 0.5 else weights.read_bytes()
    if isinstance(hostile, dict) and {"sha256", "features", "hidden", "knobs"} <= hostile.keys():
        hostile["sha256"] = files_digest(raw, {key: hostile[key] for key in ("features", "hidden", "knobs")})
    (tmp_path / "p.safetensors").write_bytes(raw)
    (tmp_path / "p.json").write_text(json.dumps(hostile))
    with only_expected_errors():
        load_policy(tmp_path / "p")


@examples(200)
@given(change=CHANGE, data=st.none() | BYTES, progress=st.floats(0, 1, exclude_max=True))
@example(change=([3, 1, 1, 0, 0], "set", 10**400), data=None, progress=0.5)
def test_schedules(tmp_path, change, data, progress):
    text = json.dumps(altered(export_schedule(GaussianPolicy(hidden=4), [0.0, 0.5]), change))
    (tmp_path / "s.json").write_bytes(mutated(text.encode(), data) if data else text.encode())
    with only_expected_errors():
        controller = ScheduleController(load_schedule(tmp_path / "s.json"))
        apply_multipliers(
            [{"name": "wte"}], [{"lr": 1.0, "weight_decay": 0.1}], controller.decide({"progress": progress})
        )


# -----------------------------------------------------------------------------
# text and tokens


@examples(80)
@given(change=BYTES)
def test_shards(corpus, tmp_path, change):
    shutil.copytree(corpus, tmp_path / "shards", dirs_exist_ok=True)
    path = sorted((tmp_path / "shards").iterdir())[0]
    path.write_bytes(mutated(path.read_bytes(), change))
    with only_expected_errors():
        for shard in (lambda train, val: [*train, val])(*split_shards(tmp_path / "shards")):
            for texts in iter_texts(shard):
                assert all(isinstance(text, str) for text in texts)


@examples(150)
@given(change=CHANGE, data=st.none() | BYTES)
def test_tokenizers(base, tmp_path, change, data):
    text = json.dumps(altered(json.loads((base / "tokenizer" / "smoke" / "tokenizer.json").read_text()), change))
    (tmp_path / "tokenizer.json").write_bytes(mutated(text.encode(), data) if data else text.encode())
    with only_expected_errors():
        tokenizer = Tokenizer.load(tmp_path)
        assert (
            tokenizer.decode(tokenizer.encode("def f(x): return 1234  # text\n\n"))
            == "def f(x): return 1234  # text\n\n"
        )


# -----------------------------------------------------------------------------
# runs


@pytest.fixture(scope="module")
def run(base, corpus):
    """`run(module, *flags)` runs a script in this process through `run_main` and returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        handlers = {number: signal.getsignal(number) for number in SIGNALS}

        def script(module, *flags):
            patch.setattr(sys, "argv", [module.__name__, *flags])
            with only_expected_errors(), pytest.raises(SystemExit) as end:
                run_main(module.main, JelError)
            return end.value.code

        yield script
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(base, corpus, run):
    """A finished run's folder, and the flags of the run."""
    flags = [
        "--preset",
        "smoke",
        "--data",
        str(corpus),
        "--device-type",
        "cpu",
        "--eval-every",
        "0",
        "--sample-tokens",
        "0",
        "--save-every",
        "5",
        "--controller",
        "tests.test_fuzz:Counter",
    ]
    assert run(base_train, *flags, "--model-tag", "fuzz/whole") in (0, None)
    return base / "runs" / "fuzz" / "whole", flags


class Counter:
    """A controller with a state: the number of its decisions."""

    observes = ("step",)
    decisions = 0

    def decide(self, observation):
        self.decisions += 1
        return {"*": {"lr": 1 / self.decisions}}

    def state_dict(self):
        return {"decisions": self.decisions}

    def load_state_dict(self, state):
        self.decisions = state["decisions"]


@examples(25)
@given(
    change=CHANGE,
    tensor=st.sampled_from([None, None, torch.ones(3), torch.tensor(math.nan), torch.ones(2, 2, dtype=torch.int8)]),
)
def test_checkpoints_with_a_matching_manifest_but_hostile_values(finished, run, capsys, change, tensor):
    folder, flags = finished
    damaged = folder.parent / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(folder, damaged)
    (damaged / "result.json").unlink()
    step, state = load_checkpoint(damaged / "checkpoints")
    state = altered(state, (*change[:2], tensor if tensor is not None else change[2]))
    if isinstance(state, dict):
        save_checkpoint(damaged / "checkpoints", step, state)
    code = run(base_train, *flags, "--model-tag", "fuzz/damaged", "--resume", "auto")
    assert code in (0, 2) and (code == 0 or "error: " in capsys.readouterr().err)


@examples(60)
@given(name=st.sampled_from(["result.json", "config.json", "log.jsonl"]), change=CHANGE, data=st.none() | BYTES)
def test_records_of_runs(finished, run, monkeypatch, name, change, data):
    folder, flags = finished
    damaged = folder.parent / "records"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(folder, damaged)
    text = (damaged / name).read_text()
    if name.endswith("json"):
        text = json.dumps(altered(json.loads(text), change))
    (damaged / name).write_bytes(mutated(text.encode(), data) if data else text.encode())
    with only_expected_errors():
        read_log(damaged)
    with only_expected_errors():
        sweep_runs.row_of(sweep_runs.Job("fuzz/records", {}, [], flags))
    assert run(base_train, *flags, "--model-tag", "fuzz/records", "--resume", "auto") in (0, 2)


@examples(40)
@given(change=CHANGE, data=st.none() | BYTES)
def test_evaluation_of_damaged_records(finished, run, change, data):
    folder, flags = finished
    damaged = folder.parent / "evaluated"
    damaged.mkdir(exist_ok=True)
    shutil.copy(folder / "model.safetensors", damaged)
    text = json.dumps(altered(json.loads((folder / "config.json").read_text()), change))
    (damaged / "config.json").write_bytes(mutated(text.encode(), data) if data else text.encode())
    assert run(
        base_eval, "--model-tag", "fuzz/evaluated", "--eval-tokens", "64", "--max-tokens", "1", "--prompt", ""
    ) in (0, 2, None)


@examples(60)
@given(change=CHANGE, data=st.none() | BYTES)
def test_rows_of_a_sweep(tmp_path, change, data):
    rows = {"rows": [{"lr": 1.0, "flags": ["--sf-lr", "1.0"], "val_bpb": 2.0}], "best": 0, "runs": 1}
    text = json.dumps(altered(rows, change))
    (tmp_path / "sweep_schedule_free.json").write_bytes(mutated(text.encode(), data) if data else text.encode())
    with only_expected_errors():
        assert all(isinstance(word, str) for word in sweep.best_flags(tmp_path, "schedule_free"))


# -----------------------------------------------------------------------------
# flags

WORDS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=12)
INTS = st.sampled_from(["-7", "-1", "0", "1", "2", "3", "5", "8"])
FLOATS = st.sampled_from(["nan", "inf", "-inf", "-1", "0", "1e-30", "0.5", "1", "2", "1e30"])


def flag_of(parser):
    """A strategy for one flag of the parser with a value: small numbers, numbers out of range, words."""
    values = {int: INTS, float: FLOATS}
    named = [a for a in parser._actions if a.option_strings and a.dest not in ("help", "run", "preset")]
    return st.sampled_from(named).flatmap(
        lambda action: st.tuples(
            st.just(action.option_strings[0]),
            st.one_of(
                values.get(action.type, WORDS), *([st.sampled_from(list(action.choices))] if action.choices else [])
            ),
        )
    )


@pytest.mark.parametrize("module", [base_train, meta_train])
def test_flags(base, corpus, run, monkeypatch, capsys, module):
    """Random flags; the script runs up to its training loop, which does not start."""

    def begin(*_, **__):
        raise UserError("the training loop would start here")

    monkeypatch.setattr(module, "Stopwatch", begin)

    @examples(80)
    @given(flags=st.lists(flag_of(module.flags()), min_size=1, max_size=3))
    def check(flags):
        known = ["--preset", "smoke", "--data", str(corpus), "--device-type", "cpu", "--model-tag", "fuzz/flags"]
        assert run(module, *known, *(f"{name}={value}" for name, value in flags)) == 2
        assert "error: " in capsys.readouterr().err

    check()
