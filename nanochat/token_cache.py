"""The token cache: shards tokenized once into memory-mapped files, and the splits train, probe, val and test.

    <base>/data/tokens/<key>/
        shard_00000.tokens       the documents end to end, each <|bos|> + tokens, raw uint16 or uint32
        shard_00000.offsets.npy  (documents + 1,) int64: document d is tokens[offsets[d]:offsets[d+1]]
        cache.json               what it was made from

The key is a hash of the tokenizer and the shards (name, size, time of change), so other text or another tokenizer gets
a cache of its own. A shard's offsets are written last: a shard that has them is complete, and a build that was
interrupted continues with the others.

A cache can be carried to a machine without the text: `scripts.tok_train --carry DIR` copies it and the tokenizer into
one folder, which is then given as `--data DIR` and used in place.

Splits, by document: of the last shard, even documents are `val` and odd ones `test`; of every other shard, documents
0, 64, 128, ... are `probe` and the rest `train`. Settings are chosen on `val`; `test` is for final results only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nanochat.common import Compute, UserError, base_dir, need, print0
from nanochat.dataset import CACHE_CARD, corpus_record, is_token_cache, iter_texts, split_shards
from nanochat.files import atomic_file, locked, read_json, write_json
from nanochat.tokenizer import Tokenizer

FORMAT = 2  # version of the cache, its splits and its row plans; part of the key
PROBE_EVERY = 64  # every 64th document of a training shard is used for the controller's probe loss and nothing else
SPLITS = ("train", "probe", "val", "test")


class TokenCache:
    """The tokens of a folder of shards. Build or reopen it with `TokenCache.build`."""

    def __init__(self, folder: Path, n_shards: int, dtype: np.dtype):
        self.folder, self.n_shards, self.dtype = folder, n_shards, np.dtype(dtype)
        self._tokens: dict[int, np.ndarray] = {}

    @classmethod
    def build(cls, data_folder: Path, tokenizer: Tokenizer, compute: Compute | None = None) -> TokenCache:
        """Tokenize the shards that are not in the cache yet; every rank returns when the cache is complete.

        Rank 0 does the work, on all its cores. A folder that is a token cache itself is used as it is. Raises
        `UserError` if a split has no document, or for such a folder of another tokenizer, or a damaged one.
        """
        if is_token_cache(data_folder):
            return cls._carried(Path(data_folder), tokenizer)._checked(data_folder)
        train, val = split_shards(data_folder)
        shards = [*train, val]
        records = shard_records(shards)
        key = hashlib.sha256(json.dumps([FORMAT, tokenizer.fingerprint, records]).encode()).hexdigest()[:16]
        folder = base_dir() / "data" / "tokens" / key
        cache = cls(folder, len(shards), _dtype(tokenizer))
        with compute.together() if compute else contextlib.nullcontext():
            if compute is None or compute.is_main:
                with locked(folder):
                    card = {"tokenizer": tokenizer.fingerprint, "shards": records, "corpus": corpus_record(data_folder)}
                    write_json(folder / CACHE_CARD, card)
                    cache._fill(shards, tokenizer)
        return cache._checked(data_folder)

    @classmethod
    def _carried(cls, folder: Path, tokenizer: Tokenizer) -> TokenCache:
        """The cache that `carry` has put into `folder`."""
        card = read_json(folder / CACHE_CARD, "card of the token cache")
        try:
            fingerprint, n_shards = str(card["tokenizer"]), len(card["shards"])
        except (KeyError, TypeError):
            raise UserError(f"{folder / CACHE_CARD} is not the card of a token cache; carry it again") from None
        if fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{folder} holds tokens of another tokenizer; take the one in it: "
                f"python -m scripts.tok_train --data {folder} --force"
            )
        cache = cls(folder, n_shards, _dtype(tokenizer))
        if n_shards < 2 or not all(map(cache._is_complete, range(n_shards))):
            raise UserError(f"{folder} is damaged or was not copied to the end; carry it again")
        return cache

    def _checked(self, data_folder: Path) -> TokenCache:
        for split in SPLITS:
            if not any(len(self.documents(split, shard)[0]) for shard in self.shards(split)):
                raise UserError(
                    f"{data_folder} has no document for the {split} split; add documents: the last shard needs "
                    "2 (val and test), and another shard 2 (probe and train)"
                )
        return self

    def carry(self, tokenizer: Tokenizer, target: Path) -> None:
        """Copy the cache and its tokenizer into one folder; the card is written last. Raises `UserError` if it is full.

        `target` must be new or a carried cache, which is replaced.
        """
        if target.exists() and any(target.iterdir()) and not is_token_cache(target):
            raise UserError(f"{target} holds something else; name a new folder")
        target.mkdir(parents=True, exist_ok=True)
        (target / CACHE_CARD).unlink(missing_ok=True)
        for shard in range(self.n_shards):
            for suffix in ("tokens", "offsets.npy"):
                shutil.copyfile(self._path(shard, suffix), target / self._path(shard, suffix).name)
        tokenizer.save(target)
        shutil.copyfile(self.folder / CACHE_CARD, target / CACHE_CARD)

    def split_tokens(self, split: str) -> int:
        """Tokens of the split's documents, from which its rows are packed."""
        return sum(int(self.documents(split, shard)[1].sum()) for shard in self.shards(split))

    def __reduce__(self):  # unpickled in another process, which maps the files itself
        return TokenCache, (self.folder, self.n_shards, self.dtype)

    # -----------------------------------------------------------------------------
    # reading

    def shards(self, split: str) -> range:
        """The shards that hold `split`, by index. Raises `UserError` for a split that does not exist."""
        if split not in SPLITS:
            raise UserError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
        last = self.n_shards - 1
        return range(last, self.n_shards) if split in ("val", "test") else range(last)

    def documents(self, split: str, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Start and length, in tokens, of the split's documents in one of its shards: two (documents,) int64."""
        offsets = np.load(self._path(shard, "offsets.npy"))
        chosen = in_split(split, np.arange(len(offsets) - 1))
        return offsets[:-1][chosen], np.diff(offsets)[chosen]

    def tokens(self, shard: int) -> np.ndarray:
        """The shard's token ids, memory-mapped and read-only, (tokens,) uint16 or uint32."""
        if shard not in self._tokens:
            mapped = np.memmap(self._path(shard, "tokens"), dtype=self.dtype, mode="r")
            self._tokens[shard] = mapped.view(np.ndarray)  # slicing a plain array takes a tenth of the time
        return self._tokens[shard]

    def _path(self, shard: int, suffix: str) -> Path:
        return self.folder / f"shard_{shard:05d}.{suffix}"

    # -----------------------------------------------------------------------------
    # writing

    def _fill(self, shards: list[Path], tokenizer: Tokenizer) -> None:
        missing = [shard for shard in range(self.n_shards) if not self._is_complete(shard)]
        if not missing:
            return
        threads, start, n_bytes = os.cpu_count(), time.perf_counter(), 0
        with need("tqdm", "tokenizing text").tqdm(missing, desc="tokenizing", unit="shard", disable=None) as bar:
            for shard in bar:
                for batch_bytes in self._write_shard(shard, shards[shard], tokenizer, threads):
                    n_bytes += batch_bytes
                    bar.set_postfix_str(f"{n_bytes / 1e6:.0f} MB of text")
        print0(
            f"tokenized {len(missing)} of {self.n_shards} shards: {n_bytes / 1e6:.1f} MB of text in "
            f"{time.perf_counter() - start:.1f} s on {threads} threads -> {self.folder}"
        )

    def _is_complete(self, shard: int) -> bool:
        """Whether the shard is cached. A damaged one counts as missing, with a printed line that names it."""
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
        print0(f"cached shard {shard} of {self.folder} is damaged ({reason})")
        return False

    def _write_shard(self, shard: int, source: Path, tokenizer: Tokenizer, threads: int) -> Iterator[int]:
        """Tokenize one shard; yields the bytes of text of each batch."""
        lengths, bos = [0], np.array([tokenizer.bos], dtype=self.dtype)
        with atomic_file(self._path(shard, "tokens")) as f:
            for texts in iter_texts(source):
                for ids in tokenizer.encode_batch(texts, threads):
                    f.write(bos.tobytes() + ids.astype(self.dtype).tobytes())
                    lengths.append(1 + len(ids))
                yield sum(len(text.encode("utf-8", "replace")) for text in texts)
        with atomic_file(self._path(shard, "offsets.npy")) as f:
            np.save(f, np.cumsum(lengths, dtype=np.int64))


def _dtype(tokenizer: Tokenizer):
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def epochs_line(cache: TokenCache, tokens: int) -> str:
    """What a run that reads so many training tokens makes of the text, in one line; "" if the text is enough.

    >>> class Few(TokenCache): split_tokens = lambda self, split: 1000
    >>> epochs_line(Few(Path(), 2, np.uint16), 2500)
    'the text has 1,000 training tokens and the run reads 2,500: 2.5 epochs over the same text'
    """
    there = cache.split_tokens("train")
    if tokens <= there:
        return ""
    return (
        f"the text has {there:,} training tokens and the run reads {tokens:,}: "
        f"{tokens / max(1, there):.1f} epochs over the same text"
    )


def in_split(split: str, index):
    """Whether document `index` (an integer, or an array of them) of one of the split's shards belongs to `split`."""
    if split in ("val", "test"):
        return (index % 2 == 0) == (split == "val")
    return (index % PROBE_EVERY == 0) == (split == "probe")


def shard_records(paths: list[Path]) -> list[list]:
    """`[name, bytes, time of last change in ns]` of every shard, from which the cache's key is made."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
