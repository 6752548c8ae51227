"""Text for training: folders of parquet shards with one string column `text`.

The last shard in sorted order is held out for validation and test (see nanochat/token_cache.py).

python -m nanochat.dataset                    # the embedded corpus: Python's own library, nothing to download
python -m nanochat.dataset --from my_texts    # a folder of .jsonl (key `text`) or .txt files, made into shards
python -m nanochat.dataset -n 8               # the first 8 FineWeb-Edu shards and the held-out one
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import re
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanochat.common import UserError, base_dir, derive_seed, need, print0, run_main
from nanochat.files import read_json, write_json

SHARD_NAME = "shard_{:05d}.parquet"
CACHE_CARD = "cache.json"  # marks a folder of tokens made elsewhere (nanochat/token_cache.py)
FINEWEB_URL = "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main"
FINEWEB_LAST = 1822  # shards 0 to 1822, about 100 MB each
HELD_OUT = 8  # of a corpus made here, 1/8 is held out: half for validation, half for test
TEXT_SHARD_CHARS = 64 << 20  # characters of a shard, which is shuffled in memory
EMBEDDED_SHARD_CHARS = 9 << 17  # characters; gives about 8 shards


# -----------------------------------------------------------------------------
# finding and reading shards


def resolve_data(data: str | None = None) -> Path:
    """The folder of shards that `data` names; it is built if it does not exist yet.

    None or `"embedded"`: the embedded corpus, built on first use and kept, so that a new Python does not change it.
    `"fineweb-edu"`: what `-n` downloaded. A folder with `*.parquet`: used in place. A folder with `*.jsonl` or `*.txt`
    at any depth: made into shards once, and again when one of its files changes. A token cache made elsewhere: used in
    place. Prints one line about the corpus.
    Raises `UserError` for anything else, and for shards that cannot be used (see `split_shards`).
    """
    root = base_dir() / "data"
    if data in (None, "embedded"):
        folder = root / "embedded"
        if not folder.exists():
            build_embedded(folder)
    elif data == "fineweb-edu":
        folder = root / "fineweb-edu"
        if not (folder / SHARD_NAME.format(FINEWEB_LAST)).exists():  # else a training shard would be held out
            raise UserError(f"{folder} lacks the FineWeb-Edu shards; get some with: python -m nanochat.dataset -n 8")
    else:
        folder = Path(data).expanduser().resolve()
        if not folder.is_dir():
            raise UserError(f"data {data!r} is neither 'embedded' nor 'fineweb-edu' nor a folder that exists")
        if is_token_cache(folder):
            print0(f"data: {folder}: tokens of {corpus_record(folder).get('shards')} shards, made elsewhere")
            return folder
        if not list_shards(folder):
            folder = convert_texts(folder, root)
    split_shards(folder)
    record = corpus_record(folder)
    texts = "{files} files, {documents} documents, {bytes:,} bytes, ".format(**record) if "files" in record else ""
    print0(f"data: {folder}: {record['shards']} shards, {texts}sha256 {record['sha256'][:12]}")
    return folder


def is_token_cache(folder: Path) -> bool:
    """Whether the folder holds tokens (of `scripts.tok_train --carry`) instead of text."""
    return (Path(folder) / CACHE_CARD).exists()


def list_shards(folder: Path) -> list[Path]:
    """The `*.parquet` files of a folder, sorted by name; hidden and partial files do not count."""
    return sorted(p for p in Path(folder).glob("*.parquet") if p.is_file() and not p.name.startswith("."))


def split_shards(folder: Path) -> tuple[list[Path], Path]:
    """(training shards, held-out shard): the last shard in sorted order is for validation and test.

    Opens every shard. Raises `UserError` for one that cannot be read or has no string column `text`, for fewer than two
    shards, and if the training shards have no document or the held-out one fewer than 2.
    """
    shards = list_shards(folder)
    if not shards:
        raise UserError(f"{folder} holds no .parquet shards")
    rows = [open_shard(path).metadata.num_rows for path in shards]
    if len(shards) == 1:
        raise UserError(
            f"{shards[0]} is the only shard; add a second one (the last in sorted order is for validation and test), "
            "or give the texts as .jsonl with --from: they are split for you"
        )
    if not sum(rows[:-1]):
        raise UserError(f"{folder} has no documents for training: all its shards but the last are empty")
    if rows[-1] < 2:
        raise UserError(f"{shards[-1]}, the last shard, needs 2 documents or more: for validation and for test")
    return shards[:-1], shards[-1]


def iter_texts(path: Path, row_groups: range | None = None) -> Iterator[list[str]]:
    """The documents of a shard, or of some of its row groups, in lists of at most 1024; nulls are left out.

    Raises `UserError` naming the file if it is corrupt or has no string column `text`.
    """
    file, pa = open_shard(path), parquet()[0]
    groups = list(range(file.num_row_groups) if row_groups is None else row_groups)
    try:
        for batch in file.iter_batches(1024, row_groups=groups, columns=["text"]):
            yield batch.column(0).drop_null().to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise UserError(corrupt(path, e)) from None


def parquet():
    """(pyarrow, pyarrow.parquet), imported when text is read or written. Raises `UserError` if they are missing."""
    return tuple(need(name, "reading or writing .parquet shards") for name in ("pyarrow", "pyarrow.parquet"))


def open_shard(path: Path):
    """Read a shard's footer; raises `UserError` unless it is a parquet file with a string column `text`."""
    pa, pq = parquet()
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        columns = {field.name: field.type for field in file.schema_arrow}
    except (pa.ArrowException, OSError) as e:
        raise UserError(corrupt(path, e)) from None
    if "text" not in columns:
        raise UserError(f"{path} has no column 'text', only {', '.join(columns)}; rename the one that holds the text")
    if columns["text"] not in (pa.string(), pa.large_string()):
        raise UserError(f"{path}: the column 'text' is {columns['text']}, not string; write it as strings")
    return file


def corrupt(path: Path, error: Exception) -> str:
    reason = str(error).partition("\n")[0]
    return f"{path} cannot be read as parquet ({reason}); delete it, then download or make it again"


def corpus_record(folder: Path) -> dict:
    """What identifies a corpus, for a run's `config.json`: shards, shard_bytes, sha256.

    For shards made by this module, `manifest.json` holds a hash of the documents, their number, the number of source
    files and their origin. For other shards the hash is of their names and sizes.
    """
    if is_token_cache(folder):
        card = read_json(Path(folder) / CACHE_CARD, "card of the token cache")
        return card["corpus"] if isinstance(card, dict) and isinstance(card.get("corpus"), dict) else {}
    sizes = [(path.name, path.stat().st_size) for path in list_shards(folder)]
    record = {"shards": len(sizes), "shard_bytes": sum(size for _, size in sizes)}
    manifest = Path(folder) / "manifest.json"
    saved = read_json(manifest, "manifest") if manifest.exists() else {}
    if isinstance(saved, dict) and record.items() <= saved.items():  # else shards were added or removed since
        return saved
    return record | {"sha256": hashlib.sha256(json.dumps(sizes).encode()).hexdigest()}


# -----------------------------------------------------------------------------
# making shards


def write_shards(folder: Path, documents: Iterable[tuple[str, bool]], shard_chars: int, **origin) -> None:
    """Write (text, held out?) pairs as shards and a manifest to `folder`, which appears complete or not at all.

    Raises `UserError` unless there is a document to train on and there are 2 that are held out.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    pa, pq = parquet()
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        count, size, digest = 0, 0, hashlib.sha256()
        for index, texts in enumerate(fill_shards(documents, shard_chars)):
            for raw in map(str.encode, texts):
                count, size = count + 1, size + len(raw)
                digest.update(b"%d:%b" % (len(raw), raw))
            pq.write_table(
                pa.table({"text": pa.array(texts, pa.string())}),
                new / SHARD_NAME.format(index),
                row_group_size=128,
                compression="zstd",
                write_page_checksum=True,
            )
        record = corpus_record(new)
        if record["shards"] < 2 or len(texts) < 2:  # the last shard's
            raise UserError(
                f"{origin['source']} has {count} documents, too few for training, validation and test; add more"
            )
        write_json(
            new / "manifest.json", record | {**origin, "documents": count, "bytes": size, "sha256": digest.hexdigest()}
        )
        try:
            os.rename(new, folder)
        except OSError:
            if not folder.exists():  # else another process has written the same meanwhile
                raise


def fill_shards(documents: Iterable[tuple[str, bool]], shard_chars: int) -> Iterator[list[str]]:
    """The documents of each shard, shuffled within it with a fixed seed; the last shard is the held-out one.

    Once it is full, further documents marked as held out go into training.
    """
    rng = random.Random(derive_seed(0, "shards"))
    sides, chars = {True: [], False: []}, {True: 0, False: 0}
    for text, held_out in documents:
        held_out = held_out and (chars[True] < shard_chars or len(sides[True]) < 2)
        sides[held_out].append(text)
        chars[held_out] += len(text)
        if chars[False] >= shard_chars:
            yield rng.sample(sides[False], len(sides[False]))
            sides[False], chars[False] = [], 0
    for rest in sides[False], sides[True]:
        if rest:
            yield rng.sample(rest, len(rest))


def convert_texts(source: Path, root: Path) -> Path:
    """Make shards of the `.jsonl` and `.txt` files under `source`, unless they exist; returns their folder."""
    files = sorted(
        path
        for suffix in ("jsonl", "txt")
        for path in source.rglob(f"*.{suffix}")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(source).parts)
    )
    if not files:
        raise UserError(f"{source} holds no .parquet shards, and no .jsonl or .txt files to make them of")
    stats = [(str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps([str(source), stats, HELD_OUT]).encode()).hexdigest()[:8]
    folder = root / f"{source.name}-{key}"
    if not folder.exists():
        print0(f"making shards of {len(files)} files, {sum(size for _, size, _ in stats) / 1e6:.1f} MB, in {source}")
        random.Random(derive_seed(0, "files")).shuffle(files)
        # Held out in pairs, one for validation and one for test, so that 3 documents are enough.
        documents = ((text, i % (2 * HELD_OUT) in (1, 2)) for i, text in enumerate(read_texts(files)))
        write_shards(folder, documents, TEXT_SHARD_CHARS, source=str(source), files=len(files))
    return folder


def read_texts(files: list[Path]) -> Iterator[str]:
    """The documents of `.jsonl` files (one a line) and `.txt` files (one a file), without blank ones."""
    for path in files:
        is_jsonl = path.suffix == ".jsonl"
        with open(path, "rb") as f:
            for number, raw in enumerate(f if is_jsonl else [f.read()], 1):
                try:
                    text = "" if not raw.strip() else json.loads(raw)["text"] if is_jsonl else raw.decode("utf-8-sig")
                    text.encode()  # fails for a value that is not a string, and for a lone surrogate
                except (ValueError, LookupError, TypeError, AttributeError) as e:
                    what = f'line {number} is not a JSON object with a string "text"' if is_jsonl else "not UTF-8"
                    raise UserError(f"{path}: {what} ({e}); correct or remove it") from None
                if text.strip():
                    yield text


# -----------------------------------------------------------------------------
# the embedded corpus: the source of Python's standard library

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "lib2to3", "idlelib", "ensurepip"}
TABLES = re.compile(r"_sysconfigdata|config-|encodings/|pydoc_data/|html/entities|stringprep|re/_casefix")  # generated
BORDERS = (r"(?<=\n\n)(?=\S)", r"(?<=\n\n)(?=    (?:@|(?:def|class|async)\b))", r"(?<=\n\n)(?=[^\n])", r"(?<=\n)")


def build_embedded(folder: Path) -> None:
    """Write the embedded corpus. A source file is held out as a whole or not at all."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = stdlib_texts(library)
    if not texts:
        raise UserError(f"this Python has no library source in {library}; name a folder of texts instead")
    rng = random.Random(derive_seed(0, "embedded"))
    to_hold_out, documents = sum(map(len, texts.values())) / HELD_OUT, []
    for name in rng.sample(sorted(texts), len(texts)):
        documents += [(piece, to_hold_out > 0) for piece in split_source(texts[name])]
        to_hold_out -= len(texts[name])
    rng.shuffle(documents)
    write_shards(
        folder, documents, EMBEDDED_SHARD_CHARS, source="embedded", files=len(texts), python=platform.python_version()
    )


def stdlib_texts(library: Path) -> dict[str, str]:
    """The library's source by file name: UTF-8 files of 500 bytes or more, without tests and generated tables."""
    texts = {}
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if SKIPPED.isdisjoint(name.parts) and not TABLES.match(name.as_posix()) and path.stat().st_size >= 500:
            with contextlib.suppress(UnicodeDecodeError):
                texts[name.as_posix()] = path.read_text(encoding="utf-8")
    return texts


def split_source(text: str, shortest: int = 400, longest: int = 1200) -> list[str]:
    """Cut source into documents of `shortest` to `longest` characters (the last one up to `shortest` longer).

    A document begins at a top-level statement where possible, else at a method, a paragraph or a line. Joined, the
    documents are `text` again.
    """

    def parts(text: str, level: int) -> Iterator[str]:
        if len(text) <= longest - shortest or level == len(BORDERS):
            yield text
        else:
            for part in re.split(BORDERS[level], text):
                yield from parts(part, level + 1)

    pieces = [""]
    for part in parts(text, 0):
        if len(pieces[-1]) >= shortest and len(pieces[-1]) + len(part) > longest:
            pieces.append("")
        pieces[-1] += part
    if len(pieces) > 1 and len(pieces[-1]) < shortest:
        pieces[-2:] = ["".join(pieces[-2:])]
    return pieces


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare a corpus; without flags, the embedded one.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--from", dest="source", metavar="DIR", help="a folder of .parquet, .jsonl or .txt files")
    choice.add_argument("-n", type=int, help="download the first N FineWeb-Edu shards and the held-out one")
    parser.add_argument("-w", "--workers", type=int, default=4, help="parallel downloads (default: %(default)s)")
    parser.add_argument("--url", default=FINEWEB_URL, help="a mirror to download from (default: %(default)s)")
    args = parser.parse_args()
    if args.n is not None:
        if not 0 < args.n <= FINEWEB_LAST:
            raise UserError(f"-n {args.n}: FineWeb-Edu has {FINEWEB_LAST} training shards; give 1 to {FINEWEB_LAST}")
        from nanochat.download import download_files  # imported here: reading shards does not need `requests`

        names = [SHARD_NAME.format(i) for i in (FINEWEB_LAST, *range(args.n))]
        download_files(args.url, names, base_dir() / "data" / "fineweb-edu", check=open_shard, workers=args.workers)
    resolve_data(args.source if args.n is None else "fineweb-edu")


if __name__ == "__main__":
    run_main(main)
