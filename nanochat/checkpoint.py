"""Checkpoints of a run: saved atomically and off the training thread, verified before they are used.

    <folder>/step_00000120/tensors.safetensors   every tensor, named by its JSON pointer (RFC 6901), e.g. /model/lm_head.weight
                           state.json            the rest of the state, with null where a tensor belongs
                           manifest.json         format, step, and the size and sha256 of the two files above

A state is a nested dict with str keys; its leaves are tensors, int, float (NaN and inf too), str, bool, None, or lists.
Only rank 0 saves (callers gather first); every rank loads, from the shared file system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import stat
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from nanochat.common import UserError, print0

FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
SPACE_MARGIN = 2**20  # bytes beyond the data itself: headers, manifest, the file system's own bookkeeping
_STEP = r"step_([0-9]{8}|[1-9][0-9]{8,})"
_LEFTOVER = re.compile(rf"\.({_STEP})\.(?P<kind>tmp|old)-[0-9]+")


def save_checkpoint(folder: Path, step: int, state: dict, keep: int = 2) -> None:
    """Save `state` as `<folder>/step_<step>` and keep the newest `keep` whole checkpoints.

    A crash at any point leaves the older checkpoints whole. Checkpoints of later steps are removed: the run has gone back
    to before them, and a resume must not pick them up. Raises `UserError` if it cannot be written (the message gives the
    MB needed and free on a full disk), `TypeError` for a leaf that has no place in a state.
    """
    _write(Path(folder), step, *_snapshot(state), keep)


class CheckpointWriter:
    """`save_checkpoint` on a background thread: `save` copies the tensors once and returns.

    At most one save is under way. What goes wrong in it is raised by the next `save`, `wait` or `close`.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = Path(folder), keep
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._underway: Future | None = None

    def save(self, step: int, state: dict) -> None:
        self.wait()  # before the copy, so that there is never more than one of them in memory
        self._underway = self._pool.submit(_write, self.folder, step, *_snapshot(state), self.keep)

    def wait(self) -> None:
        underway, self._underway = self._underway, None
        if underway is not None:
            underway.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def load_checkpoint(folder: Path, step: int | None = None) -> tuple[int, dict] | None:
    """`(step, state)` of the newest whole checkpoint, tensors on the CPU; None if there is no checkpoint at all.

    Damaged ones are skipped, in one printed line. With several ranks, rank 0 should choose and the others ask for its
    `step`. Raises `UserError` if every checkpoint is damaged, or if the `step` asked for is missing or damaged.
    """
    folder = Path(folder)
    with contextlib.suppress(OSError), _lock(folder, patience=0) as alone:  # tidying is a courtesy, not a duty, here
        if alone:
            _sweep(folder)
    steps = _steps(folder)
    if step is not None and step not in steps:
        raise UserError(f"{folder} has no checkpoint of step {step}; it has {steps or 'none'}")
    damaged = []
    for candidate in steps if step is None else [step]:
        path = folder / _name(candidate)
        try:
            found, state = _read(path)
            if found != candidate:
                raise UserError(f"{path} is damaged (its manifest is that of step {found!r})")
        except UserError as e:
            damaged.append(str(e))
        else:
            if damaged:
                print0(f"{'; '.join(damaged)}: using the one before, {path.name}")
            return candidate, state
    if damaged:
        raise UserError(f"no checkpoint to resume from: {'; '.join(damaged)}; restore one from a copy, or move it away")
    return None


def save_weights(path: Path, weights: dict[str, torch.Tensor], description: dict) -> None:
    """Write a model's weights as one .safetensors file, atomically, with `description` as JSON in its metadata."""
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in weights.items()}
    safetensors.torch.save_file(tensors, temporary, metadata={"description": json.dumps(description)})
    _fsync(temporary)
    os.replace(temporary, path)


def load_model_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a .safetensors file, in a checkpoint (its `model`), or in the newest of a folder of checkpoints.

    Raises `UserError` if there are none or the file is malformed; `check_tensors` says whether they fit a model.
    """
    path = Path(path).resolve()
    if path.is_dir():
        newest = _read(path) if (path / MANIFEST).exists() else load_checkpoint(path)
        weights = newest[1].get("model") if newest else None
    elif path.exists():
        with _untrusted(path):
            weights = safetensors.torch.load(_read_file(path))
    else:
        raise UserError(f"weights {path} do not exist")
    if not (isinstance(weights, dict) and weights and all(isinstance(t, torch.Tensor) for t in weights.values())):
        raise UserError(f"{path} holds no model weights; give a checkpoint or a .safetensors file")
    return weights


def check_tensors(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], what: str) -> None:
    """Raise `UserError`, naming the first key at fault, unless names and shapes agree and every float is finite."""
    if not isinstance(found, dict):
        raise UserError(f"{what}: there are no tensors in it")
    for name, tensor in expected.items():
        if not isinstance(found.get(name), torch.Tensor):
            raise UserError(f"{what}: tensor {name!r} is missing")
        if found[name].shape != tensor.shape:
            raise UserError(f"{what}: tensor {name!r} has shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}")
        values = found[name].float() if found[name].dtype.itemsize == 1 else found[name]  # isfinite lacks some float8
        if values.is_floating_point() and not values.isfinite().all():
            raise UserError(f"{what}: tensor {name!r} has values that are not finite")
    for name in found:
        if name not in expected:
            raise UserError(f"{what}: tensor {name!r} is unknown to this model")


# -----------------------------------------------------------------------------
# random number generators

def rng_state(device: torch.device) -> dict:
    """The exact state of `random`, numpy's global generator, torch's on the CPU and, on CUDA, that of `device`."""
    version, internal, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    key = numpy_state["state"]["key"].tolist()
    state = {"python": [version, list(internal), gauss], "torch": torch.get_rng_state(),
             "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}}}
    if torch.device(device).type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict, device: torch.device) -> None:
    """Undo everything since `rng_state(device)`. Raises `UserError` for a malformed state."""
    try:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        if not 0 <= state["numpy"]["state"]["pos"] <= 624:  # numpy would read past the end of its 624 words
            raise ValueError("numpy position out of range")
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if torch.device(device).type == "cuda":
            if "cuda" in state:
                torch.cuda.set_rng_state(state["cuda"], device)
            else:
                print0("the checkpoint was saved without CUDA: its generator goes on from the seed")
    except Exception as e:  # four libraries, each with its own types for a malformed state
        raise UserError(f"the random state in the checkpoint is malformed ({_one_line(e)})") from None


# -----------------------------------------------------------------------------
# a state as tensors and JSON

def _snapshot(state: dict) -> tuple[dict[str, torch.Tensor], bytes]:
    """CPU copies of the tensors by JSON pointer, and the JSON text of the rest."""
    tensors: dict[str, torch.Tensor] = {}
    return tensors, json.dumps(_split(state, "", tensors)).encode()


def _split(tree, path: str, tensors: dict):
    """`tree` with None in place of each tensor; the tensors go into `tensors`, one contiguous copy each."""
    if isinstance(tree, torch.Tensor):
        tensors[path] = torch.empty(tree.shape, dtype=tree.dtype, device="cpu").copy_(tree.detach())
        return None
    if isinstance(tree, dict):
        if not all(isinstance(key, str) for key in tree):
            raise TypeError(f"state{path}: keys must be str, not {list(tree)[:5]}")
        return {key: _split(value, _child(path, key), tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_split(value, _child(path, i), tensors) for i, value in enumerate(tree)]
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"state{path}: a {type(tree).__name__} cannot be saved exactly")


def _merge(tree, path: str, tensors: dict):
    """The inverse of `_split`; it takes the tensors it places out of `tensors`."""
    if tree is None:
        return tensors.pop(path, None)
    if isinstance(tree, dict):
        return {key: _merge(value, _child(path, key), tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_merge(value, _child(path, i), tensors) for i, value in enumerate(tree)]
    return tree


def _child(path: str, key: str | int) -> str:
    return f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}"


# -----------------------------------------------------------------------------
# reading: nothing in a file is believed before it is checked

def _read(path: Path) -> tuple[int, dict]:
    """`(step, state)` of the checkpoint at `path`; raises `UserError` if anything at all is wrong with it."""
    with _untrusted(path):
        step, contents = _verify(path)
        values, tensors = json.loads(contents[STATE]), safetensors.torch.load(contents[TENSORS])
        state = _merge(values, "", tensors)
        if tensors or not isinstance(state, dict):
            raise ValueError(f"{STATE} has no place for the tensors {list(tensors)[:3]}")
        return step, state


def _verify(path: Path) -> tuple[int, dict[str, bytes]]:
    """Step and file contents of a checkpoint whose manifest is matched; raises all sorts of things otherwise."""
    if path.is_symlink():
        raise ValueError("it is a symbolic link")
    manifest = json.loads(_read_file(path / MANIFEST))
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']!r} is not format {FORMAT}")
    if set(manifest["files"]) != {TENSORS, STATE}:  # so that no path in it can lead out of the folder
        raise ValueError(f"its manifest names {sorted(manifest['files'])}")
    contents = {name: _read_file(path / name) for name in (TENSORS, STATE)}
    for name, data in contents.items():
        if len(data) != manifest["files"][name]["bytes"]:
            raise ValueError(f"{name} has {len(data)} bytes, not {manifest['files'][name]['bytes']}")
        if _digest(data) != manifest["files"][name]:
            raise ValueError(f"{name} does not match its sha256")
    return manifest["step"], contents


def _read_file(path: Path) -> bytes:
    if not stat.S_ISREG(path.lstat().st_mode):  # a link may lead anywhere; a pipe would wait for ever
        raise ValueError(f"{path.name} is not a regular file")
    return path.read_bytes()


def _digest(data: bytes) -> dict:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@contextlib.contextmanager
def _untrusted(path: Path):
    """Any failure inside is the file's fault: parsers raise many types on hostile input, and none of them may escape."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as e:
        raise UserError(f"{path} is damaged ({_one_line(e)})") from None


def _one_line(e: Exception) -> str:
    text = " ".join(str(e).split())
    return text if isinstance(e, (ValueError, OSError)) else f"{type(e).__name__}: {text}"


# -----------------------------------------------------------------------------
# writing: a hidden folder, made durable, then one rename

def _write(folder: Path, step: int, tensors: dict[str, torch.Tensor], text: bytes, keep: int) -> None:
    if keep < 1:
        raise UserError(f"cannot keep {keep} checkpoints; keep at least 1")
    needed = sum(t.nbytes for t in tensors.values()) + len(text) + SPACE_MARGIN
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder, patience=10):
            try:
                _sweep(folder)
                if shutil.disk_usage(folder).free < needed:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                temporary = _hidden(folder / _name(step), "tmp")
                _write_files(temporary, step, tensors, text)
                _publish(temporary, folder / _name(step))
                _prune(folder, step, keep)
            finally:
                _sweep(folder)
    except OSError as e:
        reason = _one_line(e)
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
            reason = f"the disk is full, {needed / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free"
        last = next((s for s in _steps(folder) if _is_whole(folder / _name(s))), "none")
        raise UserError(f"saving step {step} in {folder} failed: {reason}; the last saved checkpoint is {last}") from None


def _write_files(path: Path, step: int, tensors: dict[str, torch.Tensor], text: bytes) -> None:
    path.mkdir()
    (path / STATE).write_bytes(text)
    try:
        safetensors.torch.save_file(tensors, path / TENSORS)
    except SafetensorError as e:  # its writer hides the operating system's error in the message
        code = re.search(r"os error (\d+)", str(e))
        raise OSError(int(code[1]) if code else errno.EIO, str(e)) from None
    tensors.clear()  # the snapshot's memory is needed no longer, and what follows reads whole files
    shutil.copymode(path / STATE, path / TENSORS)  # safetensors would let only the owner read it
    files = {name: _digest((path / name).read_bytes()) for name in (TENSORS, STATE)}
    (path / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}))
    for durable in (path / TENSORS, path / STATE, path / MANIFEST, path):
        _fsync(durable)


def _publish(temporary: Path, final: Path) -> None:
    """Rename into place. A checkpoint of the same step steps aside; `_sweep` brings it back if we die in between."""
    if os.path.lexists(final):
        os.replace(final, _hidden(final, "old"))
    os.replace(temporary, final)
    _fsync(final.parent)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove later steps, and what is older than the newest `keep` whole ones: an unreadable fallback is none."""
    kept = 0
    for old in _steps(folder):
        path = folder / _name(old)
        if old > step or kept == keep:
            if old > step:
                print0(f"removing {path}: the run has gone back to step {step}")
            os.replace(path, _hidden(path, "tmp"))  # gone at once; `_sweep` does the slow part
        elif old == step or _is_whole(path):
            kept += 1


def _sweep(folder: Path) -> None:
    """Remove hidden leftovers, except a checkpoint that stepped aside for one that never came."""
    for path in list(folder.iterdir()):
        if leftover := _LEFTOVER.fullmatch(path.name):
            final = folder / leftover[1]
            if leftover["kind"] == "old" and not os.path.lexists(final):
                os.replace(path, final)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(folder: Path, patience: float):
    """Yield whether no other save or sweep is under way, after waiting up to `patience` seconds for that.

    It keeps a load (an evaluation beside the run, say) from sweeping away a live save. A save goes on even without it,
    as there is one run to a folder: the lock may be out of reach for good (NFS, a forked child that outlived its run).
    """
    handle = os.open(folder, os.O_RDONLY)
    deadline, alone = time.monotonic() + patience, False
    try:
        while not alone:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees the lock of a killed process
                alone = True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.05)
            except OSError:
                break
        yield alone
    finally:
        if alone:
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough when a forked child shares the handle
        os.close(handle)


def _steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint here, whole or not, newest first."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f"checkpoint folder {folder} cannot be read ({_one_line(e)})") from None
    return sorted((int(match[1]) for name in names if (match := re.fullmatch(_STEP, name))), reverse=True)


def _is_whole(path: Path) -> bool:
    try:
        with _untrusted(path):
            return _verify(path)[0] == int(path.name.removeprefix("step_"))
    except UserError:
        return False


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
