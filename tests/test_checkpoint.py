"""Checkpoints: bit-exact round trips, every kind of damage, death at every moment of a save, a full disk."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.checkpoint import (
    MANIFEST,
    STATE,
    TENSORS,
    CheckpointWriter,
    _entry,
    check_tensors,
    load_checkpoint,
    load_model_weights,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from nanochat.common import UserError

CPU, INF, NAN = torch.device("cpu"), math.inf, math.nan
DTYPES = [
    getattr(torch, name)
    for name in "float32 bfloat16 float16 float64 float8_e4m3fn int64 int32 int16 int8 uint8 bool".split()
]
KEYS, SHAPES = st.text(max_size=4), st.lists(st.integers(0, 3), max_size=3)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | KEYS
    | st.builds(lambda shape, dtype: torch.randn(shape).to(dtype), SHAPES, st.sampled_from(DTYPES))
)
TREES = st.recursive(LEAVES, lambda tree: st.lists(tree, max_size=3) | st.dictionaries(KEYS, tree, max_size=4))
F4 = b'{"/a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        yield patch.setattr(os, "fsync", lambda handle: None)


def same(a, b) -> bool:
    """Equal to the bit, in type, in dtype, in order of keys."""
    if isinstance(a, torch.Tensor):
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8).tolist() for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and bits[0] == bits[1]
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and same(list(a.values()), list(b.values()))
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def small_state(step: int) -> dict:
    return {"model": {"w": torch.full((3, 2), float(step)), "b": torch.arange(5)}, "lr": 0.1 * step, "step": step}


def saved(path: Path, *steps: int) -> Path:
    for step in steps:
        save_checkpoint(path / "ck", step, small_state(step), keep=9)
    return path / "ck"


def damage(file: Path, start: int, stop: int, junk: bytes = b"") -> None:
    data = file.read_bytes()
    file.write_bytes(data[:start] + junk + data[stop:])


def test_round_trip_is_bit_exact(tmp_path):
    base = torch.randn(6, 4)
    state = {
        "z": {str(d): torch.arange(6).reshape(2, 3).to(d) for d in DTYPES},
        "a": {
            "0-D": torch.tensor(2.5),
            "empty": torch.empty(0, 3),
            "odd": torch.tensor([NAN, -0.0, INF]),
            "weight": base,
            "tied": base,
            "view": base[1:3],
            "transposed": base.T,
            "strided": base[::2, ::2],
            "expanded": base[:1].expand(5, 4),
            "parameter": torch.nn.Parameter(base.clone()),
        },
        "a/0-D": base + 1,
        "~1": {"": base + 2},
        "/": {"": base + 3},
        'ü\n"': base + 4,
        "__metadata__": base,
        "json": [1, -(2**70), 0.1, -0.0, NAN, INF, -INF, True, None, "s\u2028", [], {}, [{"t": base}]],
        "empty": {},
    }
    save_checkpoint(tmp_path, 120, state)
    loaded = load_checkpoint(tmp_path, step=120)[1]
    assert same(loaded, state)
    loaded["a"]["tied"].zero_()
    assert torch.equal(loaded["a"]["weight"], base)  # nothing shares storage after loading


@settings(max_examples=50, deadline=None)
@given(state=st.dictionaries(KEYS, TREES, max_size=4), step=st.integers(0, 10**9))
def test_any_state_comes_back(state, step):
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), step, state)
        assert same(list(load_checkpoint(folder)), [step, state])


@pytest.mark.parametrize("leaf", [(1, 2), np.zeros(2), np.int64(1), {1: 2}, {3}, b"x", CPU, [{"a": (1,)}]])
def test_leaf_that_would_not_come_back_is_refused(tmp_path, leaf):
    with pytest.raises(TypeError, match="state/optimizer/x"):
        save_checkpoint(tmp_path, 1, {"optimizer": {"x": leaf}})


def test_rng_goes_on_identically_in_a_fresh_process(tmp_path):
    draw = "[random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(3).tolist()]"
    eval(draw)  # one normal each: python and numpy now have its twin in their pocket
    save_checkpoint(tmp_path, 1, {"rng": rng_state(CPU)})
    script = (
        "import random, torch, numpy as np; from nanochat.checkpoint import *; set_rng_state(load_checkpoint("
        f"{str(tmp_path)!r})[1]['rng'], torch.device('cpu')); print([{draw} for _ in range(3)])"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, text=True, capture_output=True).stdout
    assert eval(out) == [eval(draw) for _ in range(3)]


def test_rng_of_cuda_is_kept_or_its_absence_printed(monkeypatch, capsys):
    cuda, calls = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: device)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *args: calls.append(args))
    set_rng_state(rng_state(cuda), cuda)
    set_rng_state(rng_state(CPU), cuda)
    assert calls == [(cuda, cuda)] and "CUDA" in capsys.readouterr().out


def test_malformed_rng_state_is_refused():
    for key, bad in (
        ("python", [3, [1, 2], None]),
        ("python", 3),
        ("numpy", ["MT19937", [0] * 624, 10**6, 0, 0.0]),
        ("numpy", {}),
        ("torch", torch.zeros(5056, dtype=torch.uint8)),
        ("torch", None),
    ):
        with pytest.raises(UserError, match="random state"):
            set_rng_state({**rng_state(CPU), key: bad}, CPU)


@pytest.mark.parametrize("name", (TENSORS, STATE, MANIFEST))
def test_damaged_checkpoint_is_skipped_in_one_line(tmp_path, capsys, name):
    folder, rng = saved(tmp_path, 10, 20), random.Random(0)
    file = folder / "step_00000020" / name
    good = file.read_bytes()
    cuts = [good[:size] for size in (0, 1, 7, 8, len(good) // 2, len(good) - 1)] + [good + b"x"]
    flips = [good[:i] + bytes([good[i] ^ 1 << rng.randrange(8)]) + good[i + 1 :] for i in range(len(good))]
    for bad in cuts + flips:
        file.write_bytes(bad)
        assert same(list(load_checkpoint(folder)), [10, small_state(10)])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1 and "step_00000020" in lines[0] and "step 10" in lines[0]
    (tmp_path / "good").write_bytes(good)
    for plant in (Path.exists, os.mkfifo, lambda path: path.symlink_to(tmp_path / "good")):  # nothing, a pipe, a link
        file.unlink(missing_ok=True)
        plant(file)
        assert load_checkpoint(folder)[0] == 10
    (folder / "step_00000010").rename(tmp_path / "whole")
    (folder / "step_00000010").symlink_to(tmp_path / "whole")
    with pytest.raises(UserError, match="step_00000020.*step_00000010"):  # never a silent new start
        load_checkpoint(folder)


def test_no_checkpoint_and_explicit_steps(tmp_path, capsys):
    assert load_checkpoint(tmp_path / "absent") is None and load_checkpoint(tmp_path) is None
    folder = saved(tmp_path, 10, 20, 30)
    assert load_checkpoint(folder, step=10)[0] == 10 and capsys.readouterr().out == ""
    damage(folder / "step_00000020" / STATE, 3, 4)
    damage(folder / "step_00000030" / STATE, 3, 4)
    assert load_checkpoint(folder)[0] == 10 and capsys.readouterr().out.count("\n") == 1
    for path, step, words in (
        (folder, 40, "no checkpoint of step 40"),
        (folder, 20, "step_00000020 cannot be used"),
        (folder / "step_00000010" / STATE, None, "cannot be used"),
    ):
        with pytest.raises(UserError, match=words):
            load_checkpoint(path, step)


@pytest.mark.parametrize(
    "forged",
    [
        {"../x": b"x"},
        {"run.pkl": b"x"},
        {"files": {}},
        {"files": [TENSORS, STATE]},
        {"files": {TENSORS: 0, STATE: 3}},
        {"step": 10**6},
        {"format": 2},
        {MANIFEST: b"[]"},
        {MANIFEST: b"[" * 10**5},
        {STATE: b"[" * 10**5},
        {STATE: b"3"},
        {STATE: b"[" * 900 + b"]" * 900},
        {STATE: b"\xff"},
        {STATE: b'{"a":' + b"9" * 10**5 + b"}"},
        {STATE: b"{}"},
        {STATE: b'{"model":{"w":1,"b":2}}'},
        {TENSORS: b"\xff" * 64},
        {TENSORS: len(F4).to_bytes(8, "little") + F4 + b"x"},
    ],
    ids=lambda forged: str(forged)[:40],
)
def test_forged_checkpoint_gets_one_clear_line(tmp_path, forged):
    path = saved(tmp_path, 10) / "step_00000010"
    manifest = json.loads((path / MANIFEST).read_text())
    for key, value in forged.items():
        if key not in (MANIFEST, *manifest):  # a file, and a manifest that agrees with it
            (path / key).write_bytes(value)
            manifest["files"][key] = _entry(value)
    manifest.update({key: value for key, value in forged.items() if key in manifest})
    (path / MANIFEST).write_bytes(forged.get(MANIFEST, json.dumps(manifest).encode()))
    with pytest.raises(UserError, match="step_00000010 cannot be used") as caught:
        load_checkpoint(path.parent)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from((1, 2)),
            st.sampled_from((TENSORS, STATE, MANIFEST)),
            st.binary(max_size=20),
            st.integers(0, 400),
            st.integers(0, 400),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_random_corruption_is_skipped_or_refused(blows):
    with tempfile.TemporaryDirectory() as folder:
        folder = saved(Path(folder), 1, 2)
        for step, name, junk, start, size in blows:
            damage(folder / f"step_{step:08d}" / name, start, start + size, junk)
        try:
            step, state = load_checkpoint(folder)
            assert same(state, small_state(step))
        except UserError as e:
            assert "step_00000001" in str(e) and "step_00000002" in str(e)


@pytest.mark.parametrize("fault", ["killed", "broken disk"])
def test_save_stopped_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, fault):
    write, seen, new = safetensors.torch.save_file, count(), {"new": torch.ones(3)}
    moments = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "tensors", "fsync"}
    monkeypatch.setattr(os, "fsync", lambda handle: sys.audit("fsync"))
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *args: (sys.audit("tensors"), write(*args)))

    def stop(event, args):  # an audit hook is called just before each access to the file system
        if event in moments and next(seen) == moment:
            if fault == "killed":
                os._exit(1)
            raise OSError(errno.EIO, "broken")

    for moment in count():
        folder = saved(tmp_path / str(moment), 10, 20)
        child = os.fork()
        if child == 0:
            try:
                sys.addaudithook(stop)
                with contextlib.suppress(UserError):
                    save_checkpoint(folder, 20, new, keep=1)
                os._exit(int(next(seen) > moment))  # 0: that moment never came
            finally:
                os._exit(2)  # an exception of another type
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        step, state = load_checkpoint(folder)
        assert status < 2 and step == 20 and (same(state, new) or same(state, small_state(20)))
        assert same(state, new) or same(load_checkpoint(folder, step=10)[1], small_state(10))
        save_checkpoint(folder, 40, new, keep=1)
        assert os.listdir(folder) == ["step_00000040"]
        if status == 0:
            break
    assert moment > 25 and same(state, new)


def test_everything_is_durable_before_it_is_visible(tmp_path, monkeypatch):
    events, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append((a.name, b.name)), replace(a, b)))
    save_checkpoint(tmp_path, 1, small_state(1))
    assert len({file.stat().st_mode for file in (tmp_path / "step_00000001").iterdir()}) == 1
    hidden = f".step_00000001.tmp-{os.getpid()}"
    assert events == [TENSORS, STATE, MANIFEST, hidden, (hidden, "step_00000001"), tmp_path.name]


def test_full_disk_says_how_much_is_needed(tmp_path, monkeypatch):
    folder, big, usage = saved(tmp_path, 10), {"w": torch.zeros(1_000_000)}, shutil.disk_usage(tmp_path)
    full = safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
    for owner, name, fake in (
        (safetensors.torch, "save_file", lambda *_: (_ for _ in ()).throw(full)),
        (shutil, "disk_usage", lambda _: usage._replace(free=2_500_000)),
    ):
        monkeypatch.setattr(owner, name, fake)
        with pytest.raises(UserError, match=r"5\.0 MB are needed .* the last saved checkpoint is 10") as caught:
            save_checkpoint(folder, 20, big)
        assert os.listdir(folder) == ["step_00000010"] and load_checkpoint(folder)[0] == 10
    assert "disk is full" in str(caught.value) and "2.5 MB free" in str(caught.value)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_newest_whole_checkpoints_are_kept_and_none_of_an_abandoned_future(tmp_path, capsys, keep):
    folder = saved(tmp_path, 10, 20, 30, 40, 60)
    damage(folder / "step_00000040" / TENSORS, 9, 10)
    save_checkpoint(folder, 50, small_state(50), keep)
    kept = sorted([*(10, 20, 30, 50)[-keep:], *[40] * (keep > 1)])  # 40 does not count, and goes once it is the oldest
    assert sorted(os.listdir(folder)) == [f"step_{step:08d}" for step in kept]
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_writer_saves_what_the_tensors_were_and_raises_errors_once(tmp_path, monkeypatch):
    state, gate, write = small_state(1), threading.Event(), safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *args: (gate.wait(10), write(*args)))
    with CheckpointWriter(tmp_path) as writer:
        writer.save(1, state)
        state["model"]["w"].zero_()  # while nothing is written yet
        assert load_checkpoint(tmp_path) is None
        threading.Timer(0.1, gate.set).start()
        writer.save(2, state)  # waits for the first
        assert same(load_checkpoint(tmp_path, step=1)[1], small_state(1))
    assert load_checkpoint(tmp_path)[0] == 2
    writer = CheckpointWriter(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    for surface in (writer.wait, lambda: writer.save(4, state), writer.close):
        writer.save(3, state)
        with pytest.raises(UserError, match="the disk is full"):
            surface()
        writer.wait()


def test_weights_come_from_a_checkpoint_a_folder_or_a_file(tmp_path):
    folder, weights = saved(tmp_path, 10, 20), small_state(20)["model"]
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    shutil.copytree(folder / "step_00000020", tmp_path / "best")
    for path in ("ck", "ck/step_00000020", "best", "w.safetensors"):
        check_tensors(weights, load_model_weights(tmp_path / path), "weights")
    damage(tmp_path / "w.safetensors", 20, 30)
    damage(folder / "step_00000020" / TENSORS, 0, 1)
    save_checkpoint(tmp_path / "other", 1, {"model": {"w": 3}})
    for path in ("w.safetensors", "ck/step_00000020", "other", "absent"):
        with pytest.raises(UserError, match=path):
            load_model_weights(tmp_path / path)
    for found, words in (
        ({"w": None}, "'w' is missing"),
        ({"w": torch.ones(3)}, r"'w' has shape \[3\], not"),
        ({"w": torch.full((3, 2), NAN)}, "'w' has values"),
        ({"x": CPU}, "'x' is not expected"),
    ):
        with pytest.raises(UserError, match=f"best: tensor {words}"):
            check_tensors(weights, {**weights, **found}, "best")
