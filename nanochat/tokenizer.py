"""Byte-level BPE: trained with `rustbpe`, applied with `tiktoken`, stored as one JSON file. Either package is imported
when it is first needed: a machine with a token cache and this file needs neither.

Ids: the 256 single bytes, the merges in the order they were learned, then the special tokens, `<|bos|>` first.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nanochat.common import UserError, base_dir, need
from nanochat.files import read_json, write_json

FORMAT = 1
FILE_NAME = "tokenizer.json"
RETRAIN = "train it again: python -m scripts.tok_train --force"

SPECIAL_TOKENS = [
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
]

# Text is first cut into these pieces; merges never cross a cut. GPT-4's pattern with two changes: digits in groups of
# at most 2 (a small vocabulary cannot spare tokens for 1,000 numbers), and whitespace in pieces of at most 256 (on an
# unbounded run the regex engine backtracks until its stack overflows: a million spaces would crash the program).
SPLIT_PATTERN = "|".join(
    [
        r"'(?i:[sdmt]|ll|ve|re)",  # English contractions
        r"[^\r\n\p{L}\p{N}]?+\p{L}+",  # a word, with one space or sign before it
        r"\p{N}{1,2}",  # digits
        r" ?[^\s\p{L}\p{N}]++[\r\n]*",  # signs, with the line break after them
        r"\s{0,256}[\r\n]",  # blank lines
        r"\s{1,256}(?!\S)",  # whitespace, except the last one, which goes with the next word
        r"\s",
    ]
)


def tokenizer_folder(name: str = "default") -> Path:
    """Where `scripts.tok_train` saves the tokenizer called `name`."""
    return base_dir() / "tokenizer" / name


class Tokenizer:
    """A fixed vocabulary. The name of a special token in a text is encoded as ordinary characters.

    `ranks`: the bytes of every ordinary token, by id. Raises `ValueError` if they lack a byte or repeat a token.
    """

    def __init__(self, pattern: str, ranks: list[bytes]):
        self.pattern, self.ranks = pattern, ranks
        if len(set(ranks)) < len(ranks) or not {bytes([b]) for b in range(256)} <= set(ranks):
            raise ValueError("its ranks repeat a token or lack a byte")
        self.specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        self.bos = self.specials["<|bos|>"]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn `vocab_size` - 9 ordinary tokens; the same texts in the same order give the same tokenizer.

        Raises `UserError` if the vocabulary is too small for bytes and special tokens, or too large for the text.
        """
        n_ranks, smallest = vocab_size - len(SPECIAL_TOKENS), 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise UserError(
                f"--vocab-size {vocab_size} is too small; the 256 bytes and the special tokens need {smallest}"
            )
        trainer = need("rustbpe", "training a tokenizer").Tokenizer()
        trainer.train_from_iterator(map(well_formed, texts), n_ranks, pattern=SPLIT_PATTERN)
        ranks = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
        if len(ranks) < n_ranks:
            reached = len(ranks) + len(SPECIAL_TOKENS)
            raise UserError(
                f"the text is too small for --vocab-size {vocab_size}: its merges end at a vocabulary of "
                f"{reached}; choose at most that, or give more text"
            )
        return cls(SPLIT_PATTERN, ranks)

    # -----------------------------------------------------------------------------
    # disk

    @functools.cached_property
    def _definition(self) -> dict:
        return {
            "format": FORMAT,
            "pattern": self.pattern,
            "special_tokens": SPECIAL_TOKENS,
            "ranks": [base64.b64encode(token).decode() for token in self.ranks],
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the definition: tokenizers of the same fingerprint give the same tokens for every text."""
        return hashlib.sha256(json.dumps(self._definition, sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the definition to `folder`/tokenizer.json."""
        write_json(Path(folder) / FILE_NAME, self._definition)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read what `save` wrote. Raises `UserError` if it is missing, malformed or of another format."""
        path = Path(folder) / FILE_NAME
        if not path.exists():
            raise UserError(f"there is no tokenizer in {folder}; train one: python -m scripts.tok_train")
        saved = read_json(path, "tokenizer")
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise UserError(f"tokenizer {path} is not of format {FORMAT}; {RETRAIN}")
        try:
            if saved["special_tokens"] != SPECIAL_TOKENS:
                raise ValueError("its special tokens are not nanochat's")
            if saved["pattern"] != SPLIT_PATTERN:  # another pattern may match nothing, or backtrack without end
                raise ValueError("its split pattern is not nanochat's")
            pattern, ranks = saved["pattern"], [base64.b64decode(token, validate=True) for token in saved["ranks"]]
            return cls(pattern, ranks)
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"tokenizer {path} is malformed ({e}); {RETRAIN}") from None

    # -----------------------------------------------------------------------------
    # text <-> ids

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """The ids of `text`, after `<|bos|>` if `bos`."""
        ids = self._encode_array(text).tolist()
        return [self.bos, *ids] if bos else ids

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """The ids of every text, uint32, without `<|bos|>`. tiktoken releases the GIL: threads run in parallel."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._encode_array, texts))

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        return [*self.ranks, *map(str.encode, self.specials)]

    @functools.cached_property
    def _encoding(self):
        return need("tiktoken", "tokenizing text").Encoding(
            "nanochat",
            pat_str=self.pattern,
            special_tokens=self.specials,
            mergeable_ranks={token: rank for rank, token in enumerate(self.ranks)},
        )

    def _encode_array(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(well_formed(text), disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens by name. Bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int32: the number of bytes of each token, 0 for special tokens; used for bits per byte."""
        return np.array([len(token) for token in self.ranks] + [0] * len(SPECIAL_TOKENS), dtype=np.int32)


def well_formed(text: str) -> str:
    """`text` with lone surrogates, which JSON may contain and UTF-8 cannot express, replaced by `?`."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
