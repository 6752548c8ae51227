"""Text is tokenized once: a memory-mapped cache of token ids, one pair of files per shard, and the three splits of it.

    <base>/data/tokens/<key>/
        shard_00000.tokens       the documents end to end, each <|bos|> + tokens, raw uint16 or uint32
        shard_00000.offsets.npy  (documents + 1,) int64: document d is tokens[offsets[d]:offsets[d+1]]
        cache.json               what it was made from, for people

The key names the tokenizer and the shards (name, size, time of change), so other text or another tokenizer is another
cache. The offsets are written last: a shard that has them is whole, and an interrupted build goes on with the others.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanochat.common import Compute, UserError, base_dir, print0
from nanochat.dataset import iter_texts, split_shards
from nanochat.files import write_json
from nanochat.tokenizer import Tokenizer

FORMAT = 1  # of the cache and of the row plans beside it: a change of either rule must change it
PROBE_EVERY = 64  # documents 0, 64, 128, ... of a training shard feed the controller's probe loss and nothing else
SPLITS = ("train", "probe", "val")


class TokenCache:
    """The tokens of a folder of shards. Build or reopen it with `TokenCache.build`.

    Splits: `val` is the last shard; of every other one, `probe` is every 64th document and `train` the rest.
    """

    def __init__(self, folder: Path, n_shards: int, dtype: np.dtype):
        self.folder, self.n_shards, self.dtype = folder, n_shards, np.dtype(dtype)
        self._tokens: dict[int, np.ndarray] = {}

    @classmethod
    def build(cls, data_folder: Path, tokenizer: Tokenizer, compute: Compute | None = None) -> TokenCache:
        """Tokenize the shards that are not in the cache yet; every rank returns once all are.

        On several ranks rank 0 does the work, all its cores helping. Raises `UserError` if a split has no document.
        """
        train, val = split_shards(data_folder)
        shards = [*train, val]
        records = shard_records(shards)
        key = hashlib.sha256(json.dumps([FORMAT, tokenizer.fingerprint, records]).encode()).hexdigest()[:16]
        folder = base_dir() / "data" / "tokens" / key
        cache = cls(folder, len(shards), np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        with compute.together() if compute else contextlib.nullcontext():
            if compute is None or compute.is_main:
                with locked(folder):
                    write_json(folder / "cache.json", {"tokenizer": tokenizer.fingerprint, "shards": records})
                    cache._fill(shards, tokenizer)
        for split in SPLITS:
            if not any(len(cache.documents(split, shard)[0]) for shard in cache.shards(split)):
                raise UserError(
                    f"{data_folder} leaves no document for the {split} split; give it more documents "
                    "(validation needs a shard with 1, training another with 2)"
                )
        return cache

    def __reduce__(self):  # another process maps the files itself
        return TokenCache, (self.folder, self.n_shards, self.dtype)

    # -----------------------------------------------------------------------------
    # reading

    def shards(self, split: str) -> range:
        """The shards that hold `split`, by index. Raises `UserError` for a split that does not exist."""
        if split not in SPLITS:
            raise UserError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
        return range(self.n_shards - 1, self.n_shards) if split == "val" else range(self.n_shards - 1)

    def documents(self, split: str, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the split's documents start in the shard's tokens, and how long they are: two (documents,) int64."""
        offsets = np.load(self._path(shard, "offsets.npy"))
        index = np.arange(len(offsets) - 1)
        chosen = index >= 0 if split == "val" else (index % PROBE_EVERY == 0) == (split == "probe")
        return offsets[:-1][chosen], np.diff(offsets)[chosen]

    def tokens(self, shard: int) -> np.ndarray:
        """The shard's token ids, memory-mapped and read-only, (tokens,) uint16 or uint32."""
        if shard not in self._tokens:
            mapped = np.memmap(self._path(shard, "tokens"), dtype=self.dtype, mode="r")
            self._tokens[shard] = mapped.view(np.ndarray)  # slices of a plain array cost a tenth of a memmap's
        return self._tokens[shard]

    def _path(self, shard: int, suffix: str) -> Path:
        return self.folder / f"shard_{shard:05d}.{suffix}"

    # -----------------------------------------------------------------------------
    # writing

    def _fill(self, shards: list[Path], tokenizer: Tokenizer) -> None:
        missing = [shard for shard in range(self.n_shards) if not self._is_whole(shard)]
        if not missing:
            return
        threads, start, n_bytes = os.cpu_count(), time.perf_counter(), 0
        with tqdm(missing, desc="tokenizing", unit="shard", disable=None) as bar:
            for shard in bar:
                for batch_bytes in self._write_shard(shard, shards[shard], tokenizer, threads):
                    n_bytes += batch_bytes
                    bar.set_postfix_str(f"{n_bytes / 1e6:.0f} MB of text")
        print0(
            f"tokenized {len(missing)} of {self.n_shards} shards: {n_bytes / 1e6:.1f} MB of text in "
            f"{time.perf_counter() - start:.1f} s on {threads} threads -> {self.folder}"
        )

    def _is_whole(self, shard: int) -> bool:
        """Whether the shard is cached. A damaged one is named in one printed line and counts as missing."""
        tokens_path, offsets_path = self._path(shard, "tokens"), self._path(shard, "offsets.npy")
        if not offsets_path.exists():
            return False
        try:
            offsets = np.load(offsets_path, allow_pickle=False)
            n_tokens = tokens_path.stat().st_size / self.dtype.itemsize
            if (
                offsets.dtype == np.int64
                and offsets.ndim == 1
                and len(offsets)
                and offsets[0] == 0
                and offsets[-1] == n_tokens
                and (np.diff(offsets) > 0).all()
            ):
                return True
            reason = "its files do not match"
        except (OSError, ValueError, EOFError) as e:
            reason = str(e).splitlines()[0]
        print0(f"cached shard {shard} of {self.folder} is damaged ({reason}); tokenizing it again")
        return False

    def _write_shard(self, shard: int, source: Path, tokenizer: Tokenizer, threads: int) -> Iterator[int]:
        """Tokenize one shard, yielding the bytes of text done, batch by batch."""
        lengths, bos = [0], np.array([tokenizer.bos], dtype=self.dtype)
        with atomic_file(self._path(shard, "tokens")) as f:
            for texts in iter_texts(source):
                for ids in tokenizer.encode_batch(texts, threads):
                    f.write(bos.tobytes() + ids.astype(self.dtype).tobytes())
                    lengths.append(1 + len(ids))
                yield sum(len(text.encode("utf-8", "replace")) for text in texts)
        with atomic_file(self._path(shard, "offsets.npy")) as f:
            np.save(f, np.cumsum(lengths, dtype=np.int64))


def shard_records(paths: list[Path]) -> list[list]:
    """`[name, bytes, time of last change in ns]` of every shard: what tells one folder of text from another."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


@contextlib.contextmanager
def atomic_file(path: Path):
    """A binary file that appears under its name only once it is complete and on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def locked(folder: Path):
    """One process at a time writes into `folder`; the system drops the lock of a process that dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
