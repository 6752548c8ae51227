"""Train the tokenizer on the training shards; the last shard, with validation and test, is left out.

python -m scripts.tok_train                                  paper: FineWeb-Edu, 32,768; tiny: the embedded corpus, 512
python -m scripts.tok_train --data my_texts --name my_texts  any folder of .parquet, .jsonl or .txt
python -m scripts.tok_train --carry DIR                      also tokenize, and copy tokens and tokenizer into DIR:
python -m scripts.tok_train --data DIR                       all that a machine without network or text needs
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanochat.common import UserError, print0, run_main
from nanochat.dataset import is_token_cache, iter_texts, resolve_data, split_shards
from nanochat.files import read_json, write_json
from nanochat.token_cache import TokenCache, in_split, shard_records
from nanochat.tokenizer import FILE_NAME, SPLIT_PATTERN, Tokenizer, tokenizer_folder
from scripts.presets import add_preset_flag, parse_with_preset

EVAL_CHARS = 10_000_000  # of validation text: far more than bytes per token needs to settle


def documents(shards: list[Path]) -> Iterator[str]:
    """The documents of the shards, in order."""
    for shard in shards:
        for texts in iter_texts(shard):
            yield from texts


def first_chars(texts: Iterable[str], max_chars: int, doc_cap: int) -> Iterator[str]:
    """The texts in order, each cut to `doc_cap` characters, up to `max_chars` characters in all."""
    left = max_chars
    for text in texts:
        text = text[: min(doc_cap, left)]
        yield text
        left -= len(text)
        if left == 0:
            return


def main() -> None:
    # -----------------------------------------------------------------------------
    # flags

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_preset_flag(parser)
    parser.add_argument(
        "--data", default="fineweb-edu", help="fineweb-edu, embedded, or a folder of .parquet, .jsonl or .txt"
    )
    parser.add_argument("--vocab-size", type=int, default=32768, help="special tokens included")
    parser.add_argument("--max-chars", type=int, default=2 * 10**9, help="characters of text to train on")
    parser.add_argument("--doc-cap", type=int, default=10_000, help="characters used of a document")
    parser.add_argument("--name", default="default", help="saved in <base>/tokenizer/NAME")
    parser.add_argument("--output", type=Path, help="the folder to save in, instead of --name")
    parser.add_argument("--force", action="store_true", help="replace the tokenizer that is there")
    parser.add_argument("--carry", type=Path, metavar="DIR", help="a folder to fill for another machine's --data DIR")
    args = parse_with_preset(parser, "tok_train")
    for flag, value in {"--max-chars": args.max_chars, "--doc-cap": args.doc_cap}.items():
        if value < 1:
            raise UserError(f"{flag} {value} leaves no text to train on; give a positive number of characters")

    # -----------------------------------------------------------------------------
    # a tokenizer that exists already

    output, data = args.output or tokenizer_folder(args.name), resolve_data(args.data)
    if is_token_cache(data):
        return take_carried(data, output, args.force)
    train, held_out = split_shards(data)
    settings = {
        "vocab_size": args.vocab_size,
        "max_chars": args.max_chars,
        "doc_cap": args.doc_cap,
        "split_pattern": SPLIT_PATTERN,
        "shards": [[name, size] for name, size, _ in shard_records(train)],
    }
    settings_path = output / "settings.json"
    if (output / FILE_NAME).exists() and not args.force:
        saved = read_json(settings_path, "settings") if settings_path.exists() else {}
        # The fingerprint shows whether both files are of one run: it may have been killed between the two.
        if saved == {**settings, "fingerprint": Tokenizer.load(output).fingerprint}:
            print0(f"{output} already holds the tokenizer of these settings; --force trains it again")
            return carry(data, output, args.carry)
        raise UserError(  # models that were trained with it need it
            f"{output} holds a tokenizer of other settings; give another --name or --output, or --force to replace it"
        )

    # -----------------------------------------------------------------------------
    # training

    start = time.perf_counter()
    tokenizer = Tokenizer.train(first_chars(documents(train), args.max_chars, args.doc_cap), args.vocab_size)
    tokenizer.save(output)
    write_json(settings_path, {**settings, "fingerprint": tokenizer.fingerprint})
    print0(f"trained a vocabulary of {tokenizer.vocab_size} in {time.perf_counter() - start:.1f} s -> {output}")

    # -----------------------------------------------------------------------------
    # compression of the validation split

    val = (text for i, text in enumerate(documents([held_out])) if in_split("val", i))
    texts = list(first_chars(val, EVAL_CHARS, EVAL_CHARS))
    n_bytes = sum(len(text.encode()) for text in texts)
    n_tokens = sum(map(len, tokenizer.encode_batch(texts, os.cpu_count())))
    print0(f"validation: {n_bytes} bytes, {n_tokens} tokens, {n_bytes / n_tokens:.3f} bytes per token")
    carry(data, output, args.carry)


def carry(data: Path, output: Path, target: Path | None) -> None:
    """Tokenize the text and copy tokens and tokenizer to `target`, if one is given."""
    if target:
        tokenizer = Tokenizer.load(output)
        TokenCache.build(data, tokenizer).carry(tokenizer, target.expanduser())
        print0(f"carry {target} to the other machine, and give it there: bash speedrun.sh --data DIR")


def take_carried(data: Path, output: Path, force: bool) -> None:
    """The tokenizer that was carried with the tokens in `data`, saved in `output`; nothing is trained."""
    tokenizer = Tokenizer.load(data)
    if (output / FILE_NAME).exists() and not force:
        if Tokenizer.load(output).fingerprint == tokenizer.fingerprint:
            return print0(f"{output} already holds the tokenizer that came with {data}")
        raise UserError(f"{output} holds another tokenizer; give another --name or --output, or --force to replace it")
    tokenizer.save(output)
    print0(f"tokenizer of {tokenizer.vocab_size} tokens, made elsewhere with the tokens in {data} -> {output}")


if __name__ == "__main__":
    run_main(main)
