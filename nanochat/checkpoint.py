"""Checkpoints of a run: saved atomically and off the training thread, verified before they are used.

    <folder>/step_00000120/tensors.safetensors   every tensor, named by its JSON pointer (RFC 6901), /model/wte.weight
                           state.json            the rest of the state, with null where a tensor belongs
                           manifest.json         format, step, and the size and sha256 of the two files above

A state is a nested dict with str keys; its leaves are tensors, int, float (NaN and inf too), str, bool, None, or lists.
Only rank 0 saves (callers gather first); every rank loads, from the shared file system. Loading writes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist

from nanochat.common import Compute, UserError, print0
from nanochat.files import atomic_file

FORMAT, TENSORS, STATE, MANIFEST = 1, "tensors.safetensors", "state.json", "manifest.json"
SPACE_MARGIN = 2**20  # bytes beyond the data itself: headers, manifest, the file system's own bookkeeping


def save_checkpoint(folder: Path, step: int, state: dict, keep: int = 2) -> None:
    """Save `state` as `<folder>/step_<step>` and keep the newest `keep` (at least one) whole checkpoints.

    A crash at any point leaves the older ones whole. Later steps are removed: the run has gone back to before them.
    Raises `UserError` (with the MB needed and free) if it cannot be written, `TypeError` for a leaf no state can hold.
    """
    _write(Path(folder), step, *_snapshot(state), keep)


class CheckpointWriter(contextlib.AbstractContextManager):
    """`save_checkpoint` on a background thread: `save` copies the tensors once and returns.

    At most one save is under way. An error in it is raised by the next `save`, `wait` or `close`.
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
        self._pool.shutdown()
        self.wait()

    def __exit__(self, *_) -> None:
        self.close()


def load_checkpoint(folder: Path, step: int | None = None, before: float = math.inf) -> tuple[int, dict] | None:
    """The newest whole checkpoint of a step up to `before`, else the oldest: `(step, state)`, or None if there is none.

    Damaged ones are skipped, in one printed line. With several ranks, rank 0 chooses and the others ask for its `step`.
    The tensors are on the CPU. Raises `UserError` if every checkpoint is damaged, or if the `step` asked for is
    missing or damaged.
    """
    present, damaged = _checkpoints(Path(folder)), []
    order = [*(s for s in present if s <= before), *sorted(s for s in present if s > before)]
    if step is not None and step not in present:
        raise UserError(f"{folder} has no checkpoint of step {step}; it has {list(present) or 'none'}")
    for candidate in order if step is None else [step]:
        try:
            state = _read(present[candidate], candidate)
            if damaged:
                print0(f"{'; '.join(damaged)}: using that of step {candidate}")
            return candidate, state
        except UserError as e:
            damaged.append(str(e))
    if damaged:
        raise UserError(f"no checkpoint to resume from: {'; '.join(damaged)}; restore one from a copy, or move it away")
    return None


def load_checkpoint_together(folder: Path, compute: Compute, before: float = math.inf) -> tuple[int, dict] | None:
    """`load_checkpoint`, chosen by rank 0 and loaded by all; collective."""
    found = load_checkpoint(folder, before=before) if compute.is_main else None
    if compute.world_size == 1:
        return found
    chosen = torch.tensor(found[0] if found else -1, device=compute.device)
    dist.broadcast(chosen, 0)
    if compute.is_main or chosen.item() < 0:
        return found
    return load_checkpoint(folder, step=int(chosen))


def load_model_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a .safetensors file, in a checkpoint (its `model`), or in the newest of a folder of checkpoints.

    Raises `UserError` if there are none or the file is malformed; `check_tensors` says whether they fit a model.
    """
    path = Path(path).resolve()
    if os.path.isfile(path):
        with untrusted(path):
            weights = safetensors.torch.load(path.read_bytes())
    else:
        state = _read(path) if os.path.isfile(path / MANIFEST) else (load_checkpoint(path) or (0, {}))[1]
        weights = state.get("model")
    if not (isinstance(weights, dict) and weights and all(isinstance(t, torch.Tensor) for t in weights.values())):
        raise UserError(f"{path} holds no model weights; give a checkpoint or a .safetensors file")
    return weights


def check_tensors(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], what: str) -> None:
    """Raise `UserError`, naming the first key at fault, unless names and shapes agree and every float is finite."""
    found = found if isinstance(found, dict) else {}
    for name in [*expected, *found]:
        tensor = found.get(name)
        if name not in expected:
            raise UserError(f"{what}: tensor {name!r} is not expected")
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{what}: tensor {name!r} is missing")
        if tensor.shape != expected[name].shape:
            raise UserError(f"{what}: tensor {name!r} has shape {list(tensor.shape)}, not {list(expected[name].shape)}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{what}: tensor {name!r} has values that are not finite")


def rng_state(device: torch.device) -> dict:
    """The exact state of `random`, numpy's global generator, torch's on the CPU and, on CUDA, that of `device`."""
    version, words, gauss = random.getstate()
    name, key, *rest = np.random.get_state()
    state = {"python": [version, list(words), gauss], "numpy": [name, key.tolist(), *rest]}
    state["torch"] = torch.get_rng_state()
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict, device: torch.device) -> None:
    """Go back to `rng_state(device)`; raises `UserError` if the state is malformed."""
    with untrusted("the checkpoint's random state"):
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        name, key, position, *rest = state["numpy"]
        if not 0 <= position <= 624:  # numpy itself would read past the end of its 624 words
            raise ValueError("numpy's position is out of range")
        np.random.set_state((name, key, position, *rest))
        torch.set_rng_state(state["torch"])
        if device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)
        elif device.type == "cuda":
            print0("the checkpoint comes from a CPU run: CUDA's random numbers go on from the seed")


def _snapshot(state: dict) -> tuple[dict[str, torch.Tensor], bytes]:
    """CPU copies of the tensors by JSON pointer, and the JSON text of the rest."""
    tensors = {}

    def take(leaf, pointer: str):
        if isinstance(leaf, torch.Tensor):
            tensors[pointer] = torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu").copy_(leaf.detach())
        elif not (leaf is None or isinstance(leaf, (bool, int, float, str))):
            raise TypeError(f"state{pointer}: a {type(leaf).__name__} would not come back as it was")
        return None if pointer in tensors else leaf

    return tensors, json.dumps(_map_leaves(state, take)).encode()


def _map_leaves(tree, fn, pointer: str = ""):
    """`tree` with `fn(leaf, JSON pointer)` in place of each leaf."""
    if not isinstance(tree, (dict, list)):
        return fn(tree, pointer)
    if isinstance(tree, list):
        return [_map_leaves(value, fn, f"{pointer}/{i}") for i, value in enumerate(tree)]
    if not all(isinstance(key, str) for key in tree):
        raise TypeError(f"state{pointer}: the keys must be str, not {list(tree)[:3]}")
    return {
        key: _map_leaves(value, fn, pointer + "/" + key.replace("~", "~0").replace("/", "~1"))
        for key, value in tree.items()
    }


# -- reading: a file's contents are checked before they are used ----------------


@contextlib.contextmanager
def untrusted(what: Path | str):
    """Turn any failure inside into a `UserError` that names the file: parsers raise many types on hostile input."""
    try:
        yield
    except Exception as e:
        if isinstance(e, UserError):
            raise
        kind = f"{type(e).__name__}: " if isinstance(e, (LookupError, TypeError, AttributeError, RuntimeError)) else ""
        raise UserError(f"{what} cannot be used ({kind}{' '.join(str(e).split())[:200]})") from None


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Path by step, newest first, whole or not. One that was renamed for a successor never written counts too."""
    found = {}
    with untrusted(folder):
        for name in sorted(os.listdir(folder) if folder.exists() else ()):  # hidden ones first: a visible one wins
            if match := re.fullmatch(r"step_(\d{8,})|\.step_(\d{8,})\.old-\d+", name, re.ASCII):
                found[int(match[1] or match[2])] = folder / name
    return dict(sorted(found.items(), reverse=True))


def _read(path: Path, step: int | None = None) -> dict:
    """The state saved at `path`; raises `UserError` if it is damaged."""
    contents = _verify(path, step)
    with untrusted(path):
        tensors = safetensors.torch.load(contents[TENSORS])
        state = _map_leaves(
            json.loads(contents[STATE]), lambda leaf, pointer: tensors.pop(pointer, None) if leaf is None else leaf
        )
        if tensors or not isinstance(state, dict):
            raise ValueError(f"{STATE} has no place for the tensors {list(tensors)[:3]}")
        return state


def _verify(path: Path, step: int | None) -> dict[str, bytes]:
    """The contents of a checkpoint's two files; raises `UserError` unless they match its manifest, and that `step`."""
    with untrusted(path):
        manifest = json.loads(_read_file(path / MANIFEST))
        if manifest["format"] != FORMAT or step not in (None, manifest["step"]):
            raise ValueError(f"its manifest says format {manifest['format']!r}, step {manifest['step']!r}")
        if set(manifest["files"]) != {TENSORS, STATE}:  # so no path in it can lead out of the folder
            raise ValueError(f"its manifest names {sorted(manifest['files'])}")
        contents = {name: _read_file(path / name) for name in (TENSORS, STATE)}
        for name, data in contents.items():
            if _entry(data) != manifest["files"][name]:
                raise ValueError(f"{name} ({len(data)} bytes) does not match the size and sha256 in the manifest")
        return contents


def _read_file(path: Path) -> bytes:
    if path.parent.is_symlink() or path.is_symlink() or not path.is_file():  # a link may lead anywhere, a pipe may hang
        raise ValueError(f"{path.name} is missing or not a regular file")
    return path.read_bytes()


def _entry(data: bytes) -> dict:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


# -- writing: a hidden folder, made durable, then one rename --------------------


def _write(folder: Path, step: int, tensors: dict[str, torch.Tensor], text: bytes, keep: int) -> None:
    needed = sum(t.nbytes for t in tensors.values()) + len(text) + SPACE_MARGIN
    final = folder / f"step_{step:08d}"
    new, old = (folder / f".{final.name}.{kind}-{os.getpid()}" for kind in ("tmp", "old"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        if shutil.disk_usage(folder).free < needed:
            raise OSError("the disk is full")
        new.mkdir()
        (new / STATE).write_bytes(text)
        safetensors.torch.save_file(tensors, new / TENSORS)
        shutil.copymode(new / STATE, new / TENSORS)  # safetensors would let only the owner read it
        tensors.clear()  # before whole files are read, so that there is never more than one copy in memory
        files = {name: _entry((new / name).read_bytes()) for name in (TENSORS, STATE)}
        (new / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, separators=(",", ":")))
        for durable in (new / TENSORS, new / STATE, new / MANIFEST, new):
            _fsync(durable)
        if os.path.lexists(final):
            os.replace(final, old)  # it counts until the next line has put the new one there
        os.replace(new, final)
        _fsync(folder)
        _prune(folder, step, keep)
        _sweep(folder)
    except (OSError, safetensors.SafetensorError) as e:  # the latter has the system's error in its message only
        with contextlib.suppress(OSError):
            _sweep(folder)
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
        last = next(iter(_checkpoints(folder)), "none")
        raise UserError(
            f"saving step {step} in {folder} failed ({e}): {needed / 1e6:.1f} MB are needed and "
            f"{free / 1e6:.1f} MB free; the last saved checkpoint is {last}"
        ) from None


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove later steps, and all that is older than the newest `keep` whole ones: a damaged one is no fallback."""
    whole = 0
    for candidate, path in _checkpoints(folder).items():
        if candidate <= step and whole < max(keep, 1):
            with contextlib.suppress(UserError):
                whole += bool(_verify(path, candidate))
        else:
            if candidate > step:
                print0(f"removing {path}: the run has gone back to step {step}")
            os.replace(path, folder / f".{path.name}.tmp-{os.getpid()}")  # gone at once; `_sweep` does the slow part


def _sweep(folder: Path) -> None:
    """Remove what a killed save left, but bring back a checkpoint that was renamed for one which was not written."""
    for path in list(folder.glob(".step_*")):
        final = folder / path.name.split(".")[1]
        if ".old-" in path.name and not os.path.lexists(final):
            os.replace(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_weights(path: Path, weights: dict[str, torch.Tensor], description: dict) -> None:
    """A finished model's weights in one .safetensors file, written atomically, `description` as JSON in its metadata.

    Raises `OSError` if there is no room.
    """
    tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in weights.items()}
    with atomic_file(path) as f:
        f.write(safetensors.torch.save(tensors, metadata={"description": json.dumps(description)}))
