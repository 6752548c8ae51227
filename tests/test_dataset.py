from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataset
from nanochat.common import UserError
from nanochat.dataset import corpus_record, iter_texts, list_shards, resolve_data, split_shards, split_source


def shard(path: Path, texts=("one", "two"), column="text", **kwargs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = texts if isinstance(texts, pa.Array) else list(texts)
    pq.write_table(pa.table({column: values}), path, **kwargs)
    return path


def documents(paths) -> list[str]:
    return [text for path in paths for batch in iter_texts(path) for text in batch]


def jsonl(path: Path, texts) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "embedded"
    dataset.build_embedded(folder)
    return folder


@pytest.fixture
def texts_folder(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    return folder


# -----------------------------------------------------------------------------
# the embedded corpus


def test_embedded_is_the_same_bytes_twice(embedded, tmp_path):
    again = tmp_path / "elsewhere" / "again"
    dataset.build_embedded(again)
    names = sorted(p.name for p in embedded.iterdir())
    assert names == sorted(p.name for p in again.iterdir())
    assert all((embedded / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_embedded_is_a_corpus(embedded):
    train, val = split_shards(embedded)
    assert 6 <= len(train) <= 11
    chars, held_out = sum(map(len, documents(train))), sum(map(len, documents([val])))
    assert chars > 4e6 and 1 / 9 < held_out / (chars + held_out) < 1 / 7
    lengths = sorted(map(len, documents(train)))
    assert 400 <= lengths[len(lengths) // 10] and lengths[-1] < 1700
    record = corpus_record(embedded)
    assert record["python"] == sys.version.split()[0] and record["files"] > 200
    assert record["bytes"] == sum(len(text.encode()) for text in documents([*train, val]))
    assert record["documents"] == len(documents([*train, val])) and len(record["sha256"]) == 64


def test_embedded_is_shuffled_and_holds_out_whole_files(embedded):
    library = dataset.stdlib_texts(Path(dataset.sysconfig.get_path("stdlib")))
    shards, val = split_shards(embedded)
    train, val = set(documents(shards)), set(documents([val]))
    files = [set(split_source(text)) for text in library.values()]
    assert all(pieces <= train or pieces <= val for pieces in files)
    longest = max((pieces for pieces in files if pieces <= train), key=len)
    assert all(longest & set(documents([path])) for path in shards)  # every shard has some of its parts


def test_library_files_worth_reading(tmp_path):
    long = "# words\n" * 100
    for name in [
        "good.py",
        "package/good.py",
        "test/t.py",
        "package/tests/t.py",
        "site-packages/x.py",
        "encodings/cp1.py",
        "_sysconfigdata__linux.py",
        "html/entities.py",
        "idlelib/idle.py",
        "notes.txt",
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(long)
    (tmp_path / "short.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes("é".encode("latin-1") * 600)
    assert dataset.stdlib_texts(tmp_path) == {"good.py": long, "package/good.py": long}


def test_embedded_needs_a_library(tmp_path, monkeypatch, base):
    monkeypatch.setattr(dataset.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    with pytest.raises(UserError, match="no library source"):
        resolve_data()
    assert not (base / "data" / "embedded").exists()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["def f():\n", "    x = 1\n", "\n", "\n\n", "@d\n", "    def m(self):\n"]),
            st.integers(1, 40),
        ),
        max_size=60,
    )
)
def test_split_source_keeps_every_character(lines):
    text = "".join(line * n for line, n in lines)
    pieces = split_source(text, shortest=64, longest=200)
    assert "".join(pieces) == text
    assert all(64 <= len(piece) <= 200 for piece in pieces[:-1])
    assert len(pieces) == 1 or 64 <= len(pieces[-1]) <= 264


def test_split_source_prefers_top_level():
    function = "def f(x):\n" + "    y = x\n\n" * 20 + "\n"
    pieces = split_source(function * 30, shortest=400, longest=1000)
    assert len(pieces) > 5 and all(piece.startswith("def f") for piece in pieces)
    assert split_source("x" * 10_000) == ["x" * 10_000]


def test_resolve_builds_the_embedded_corpus_once(embedded, base, capsys, monkeypatch):
    assert resolve_data() == base / "data" / "embedded"
    monkeypatch.delattr(dataset, "build_embedded")
    assert resolve_data("embedded") == base / "data" / "embedded"
    assert corpus_record(base / "data" / "embedded") == corpus_record(embedded)
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and f"{corpus_record(embedded)['files']} files" in first


# -----------------------------------------------------------------------------
# shards


def test_resolve_uses_shards_in_place(tmp_path, base, capsys):
    folder = tmp_path / "mine"
    for name in "cab":
        shard(folder / f"{name}.parquet", [name, name])
    shutil.copy(folder / "c.parquet", folder / ".z.parquet")
    (folder / "d.parquet.partial").write_bytes(b"half")
    assert resolve_data(str(folder)) == folder
    train, val = split_shards(folder)
    assert [p.name for p in train] == ["a.parquet", "b.parquet"] and val.name == "c.parquet"
    assert not (base / "data").exists() and "3 shards" in capsys.readouterr().out


def test_iter_texts_row_groups(tmp_path):
    texts = [f"document {i}" for i in range(25)]
    path = shard(tmp_path / "a.parquet", texts, row_group_size=10)
    assert documents([path]) == texts
    assert [t for b in iter_texts(path, range(1, 2)) for t in b] == texts[10:20]
    assert [t for r in range(3) for b in iter_texts(path, range(r, r + 1)) for t in b] == texts
    assert documents([shard(path, pa.array(["a", None, "b"], pa.large_string()))]) == ["a", "b"]
    assert max(map(len, iter_texts(shard(path, ["x"] * 3000)))) <= 1024


def test_record_tells_corpora_apart(tmp_path):
    shard(tmp_path / "a.parquet"), shard(tmp_path / "b.parquet")
    first = corpus_record(tmp_path)
    assert first == corpus_record(tmp_path) and first["shards"] == 2
    shard(tmp_path / "b.parquet", ["other", "texts", "here"])
    assert corpus_record(tmp_path)["sha256"] != first["sha256"]


def test_record_does_not_trust_a_stale_manifest(embedded, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(embedded, folder)
    assert corpus_record(folder) == corpus_record(embedded)
    list_shards(folder)[0].unlink()
    record = corpus_record(folder)
    assert "documents" not in record and record["shards"] == corpus_record(embedded)["shards"] - 1


NO_TEXTS = pa.array([], pa.string())
BAD_SHARDS = {  # what to do to a folder with the shards a and b, and what is said about it
    "one shard": (lambda a, b: b.unlink(), "a.parquet is the only shard.*add a second"),
    "no parquet": (lambda a, b: (a.unlink(), b.unlink()), "no .parquet shards"),
    "no column": (lambda a, b: shard(b, column="content"), "b.parquet has no column 'text', only content"),
    "bytes": (lambda a, b: shard(b, pa.array([b"one"], pa.binary())), "b.parquet.* binary, not string"),
    "numbers": (lambda a, b: shard(b, [1, 2]), "b.parquet.* int64"),
    "lists": (lambda a, b: shard(b, [["one"], ["two"]]), "b.parquet.* list"),
    "cut": (lambda a, b: b.write_bytes(b.read_bytes()[:-20]), "b.parquet cannot be read"),
    "empty file": (lambda a, b: b.write_bytes(b""), "b.parquet cannot be read"),
    "html": (lambda a, b: b.write_text("<html>not found</html>" * 100), "b.parquet cannot be read"),
    "nothing to validate": (lambda a, b: shard(b, NO_TEXTS), "b.parquet, the last shard, needs 2 documents"),
    "nothing to test": (
        lambda a, b: shard(b, ["one"]),
        "b.parquet, the last shard, needs 2 .* validation and for test",
    ),
    "nothing to train": (lambda a, b: shard(a, NO_TEXTS), "no documents for training"),
}


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_bad_shards(tmp_path, kind):
    spoil, message = BAD_SHARDS[kind]
    folder = tmp_path / "bad"
    spoil(shard(folder / "a.parquet"), shard(folder / "b.parquet"))
    with pytest.raises(UserError, match=message) as e:
        resolve_data(str(folder))
    assert "\n" not in str(e.value)


def test_corrupt_pages_are_found(tmp_path):
    path = shard(
        tmp_path / "a.parquet",
        [f"{i} words of text" * 20 for i in range(100)],
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="a.parquet cannot be read"):
        documents([path])


# -----------------------------------------------------------------------------
# folders of text


def test_texts_become_shards_once(texts_folder, base, capsys):
    jsonl(texts_folder / "a.jsonl", [f"line {i}" for i in range(40)] + [" \n", ""])
    (texts_folder / "deep" / "b.txt").write_text("deep ünïcode\n", encoding="utf-8-sig")
    (texts_folder / ".hidden.txt").write_text("hidden")
    folder = resolve_data(str(texts_folder))
    assert folder.parent == base / "data" and folder.name.startswith("texts-")
    train, val = split_shards(folder)
    assert sorted(documents([*train, val])) == sorted([f"line {i}" for i in range(40)] + ["deep ünïcode\n"])
    assert len(documents([val])) == 6  # two of every 16: one for validation, one for test
    assert corpus_record(folder)["documents"] == 41 and corpus_record(folder)["files"] == 2
    assert resolve_data(str(texts_folder)) == folder and capsys.readouterr().out.count("making shards") == 1
    jsonl(texts_folder / "a.jsonl", ["changed", "texts"])
    assert resolve_data(str(texts_folder)) != folder
    assert [p for p in (base / "data").iterdir() if p.name.startswith(".")] == []


def test_many_shards_one_full_validation_shard(texts_folder, monkeypatch):
    monkeypatch.setattr(dataset, "TEXT_SHARD_CHARS", 1000)
    texts = [f"{i:010d}" * 10 for i in range(500)]
    jsonl(texts_folder / "a.jsonl", texts)
    train, val = split_shards(resolve_data(str(texts_folder)))
    assert sorted(documents([*train, val])) == texts and len(train) == 49
    assert len(documents([val])) == 10  # of the 64 that two in 16 would be
    assert documents(train[:1]) != sorted(documents(train[:1]))


def test_validation_is_a_sample_of_the_files(texts_folder):
    for i in range(40):
        (texts_folder / f"{i:02d}.txt").write_text(f"{i:02d}")
    _, val = split_shards(resolve_data(str(texts_folder)))
    assert len(documents([val])) == 6 and set(documents([val])) != {"01", "02", "17", "18", "33", "34"}


def test_three_texts_are_enough_to_train_validate_and_test(texts_folder):
    jsonl(texts_folder / "a.jsonl", ["one", "two", "three"])
    train, val = split_shards(resolve_data(str(texts_folder)))
    assert documents(train) == ["one"] and sorted(documents([val])) == ["three", "two"]


def test_a_held_out_shard_that_one_text_fills_has_a_second(texts_folder, monkeypatch):
    monkeypatch.setattr(dataset, "TEXT_SHARD_CHARS", 10)
    jsonl(texts_folder / "a.jsonl", [f"{i} and many more characters" for i in range(30)])
    _, val = split_shards(resolve_data(str(texts_folder)))
    assert len(documents([val])) == 2


def test_a_faster_process_wins(tmp_path):
    folder = tmp_path / "data" / "new"

    def texts():
        yield "mine", False
        shard(folder / "theirs.parquet")
        yield "mine too", True
        yield "and mine", True

    dataset.write_shards(folder, texts(), 100, source="test")
    assert [p.name for p in (tmp_path / "data").rglob("*")] == ["new", "theirs.parquet"]


@pytest.mark.parametrize(
    "line",
    [
        '{"content": "x"}',
        "[1]",
        "7",
        '{"text": 7}',
        '{"text": null}',
        "{",
        "\\ud800",
        '{"text": "\\ud800"}',
        b"\xff\xfe{}",
    ],
    ids=str,
)
def test_bad_jsonl_lines_are_named(texts_folder, base, line):
    raw = line if isinstance(line, bytes) else line.encode()
    (texts_folder / "a.jsonl").write_bytes(b'{"text": "good"}\n\n' + raw + b"\n")
    with pytest.raises(UserError, match="a.jsonl: line 3") as e:
        resolve_data(str(texts_folder))
    assert "\n" not in str(e.value) and list((base / "data").iterdir()) == []


def test_other_bad_texts(texts_folder, tmp_path):
    (texts_folder / "a.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(UserError, match="a.txt: not UTF-8"):
        resolve_data(str(texts_folder))
    (texts_folder / "a.txt").write_text("alone")
    with pytest.raises(UserError, match="1 documents, too few"):
        resolve_data(str(texts_folder))
    (texts_folder / "b.txt").write_text("in company")
    with pytest.raises(UserError, match="2 documents, too few"):
        resolve_data(str(texts_folder))
    (texts_folder / "b.txt").unlink()
    (texts_folder / "a.txt").unlink()
    with pytest.raises(UserError, match="no .parquet shards, and no .jsonl"):
        resolve_data(str(texts_folder))
    for data in ("fineweb-edu", str(tmp_path / "nowhere"), __file__):
        with pytest.raises(UserError):
            resolve_data(data)


def test_command_line_ends_in_one_line(base, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nanochat.dataset", "--from", str(tmp_path / "none")],
        cwd=Path(dataset.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
