"""From text to batches: the token cache, the packer against its slow twin, and the loader's one-integer position."""

import os
import random
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataloader, token_cache
from nanochat.common import UserError
from nanochat.dataloader import DataLoader, Rows, fixed_batches, permutation, plan_rows
from nanochat.token_cache import PROBE_EVERY, SPLITS, TokenCache
from nanochat.tokenizer import Tokenizer

T = 24


def make_texts(n, seed):
    rng = random.Random(seed)
    return [f"{seed}:{i} " + "".join(rng.choices("abcd ", k=rng.randint(0, 90))) for i in range(n)]


TEXTS = [make_texts(200, 0), make_texts(70, 1), make_texts(91, 2)]  # two training shards and the held-out one


def write_shards(folder, shards):
    folder.mkdir(parents=True)
    for i, texts in enumerate(shards):
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), folder / f"shard_{i:05d}.parquet")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(sum(TEXTS, []), 290)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(dataloader, "BUFFER_DOCUMENTS", 10)  # less than a shard, so that it is refilled and drained
    return write_shards(tmp_path / "data", TEXTS)


@pytest.fixture
def cache(data, tokenizer):
    return TokenCache.build(data, tokenizer)


def documents(cache, split):
    """Per shard, the split's documents as lists of ids."""
    for shard in cache.shards(split):
        yield [cache.tokens(shard)[start : start + n].tolist() for start, n in zip(*cache.documents(split, shard))]


def pack_slow(documents, capacity, buffer_size):
    """The packing rule, on the tokens themselves (nanochat's best-fit with cropping)."""
    waiting, buffer, rows, row = list(documents), [], [], []
    while waiting or buffer:
        while waiting and len(buffer) < buffer_size:
            buffer.append(waiting.pop(0))
        space = capacity - len(row)
        fitting = [document for document in buffer if len(document) <= space]
        chosen = max(fitting, key=len) if fitting else min(buffer, key=len)  # both take the first of equals
        buffer.pop(next(i for i, document in enumerate(buffer) if document is chosen))
        row = row + chosen[:space]
        if len(row) == capacity:
            rows.append(row)
            row = []
    return rows


# -----------------------------------------------------------------------------
# the cache


def test_cache_holds_every_document_after_bos(cache, tokenizer):
    stored = [[[tokenizer.bos, *tokenizer.encode(text)] for text in shard] for shard in TEXTS]
    assert list(documents(cache, "val")) == [stored[2][0::2]]
    assert list(documents(cache, "test")) == [stored[2][1::2]]
    assert list(documents(cache, "probe")) == [shard[::PROBE_EVERY] for shard in stored[:2]]
    assert list(documents(cache, "train")) == [[d for i, d in enumerate(shard) if i % 64] for shard in stored[:2]]
    assert cache.tokens(0).dtype == np.uint16 and not cache.tokens(0).flags.writeable
    with pytest.raises(UserError, match="train, probe, val, test"):
        cache.shards("dev")


def test_every_document_is_in_exactly_one_split(cache):
    starts = [
        (shard, int(start))
        for split in SPLITS
        for shard in cache.shards(split)
        for start in cache.documents(split, shard)[0]
    ]
    assert len(starts) == len(set(starts)) == sum(map(len, TEXTS))


def test_complete_cache_is_reused_and_other_text_or_tokenizer_is_another(cache, data, tokenizer, monkeypatch):
    other = TokenCache.build(data, Tokenizer.train(sum(TEXTS, []), 280))
    assert other.folder != cache.folder
    with monkeypatch.context() as m:
        m.setattr(token_cache, "iter_texts", None)  # not to be called
        assert TokenCache.build(data, tokenizer).folder == cache.folder
    os.utime(data / "shard_00001.parquet", ns=(1, 1))
    assert TokenCache.build(data, tokenizer).folder != cache.folder


def test_interrupted_build_goes_on_with_the_missing_shards(data, tokenizer, monkeypatch):
    real, read = token_cache.iter_texts, []

    def dies_in_the_second_shard(path):
        read.append(path.name)
        yield from real(path)
        if len(read) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(token_cache, "iter_texts", dies_in_the_second_shard)
    with pytest.raises(KeyboardInterrupt):
        TokenCache.build(data, tokenizer)
    TokenCache.build(data, tokenizer)
    assert read == [f"shard_{i:05d}.parquet" for i in (0, 1, 1, 2)]


@pytest.mark.parametrize(
    "suffix, damage",
    [
        ("tokens", lambda path: path.write_bytes(path.read_bytes()[:-2])),
        ("tokens", lambda path: path.unlink()),
        ("offsets.npy", lambda path: path.write_bytes(path.read_bytes()[:200])),
        ("offsets.npy", lambda path: path.write_bytes(b"")),
        ("offsets.npy", lambda path: np.save(path, np.load(path)[::-1])),
        ("offsets.npy", lambda path: np.save(path, np.load(path)[1:])),
        ("offsets.npy", lambda path: np.save(path, np.load(path)[[0, 2, 1, *range(3, 71)]])),
        ("offsets.npy", lambda path: np.save(path, np.load(path).astype(np.float64))),
    ],
)
def test_damaged_shard_is_named_and_built_again(cache, data, tokenizer, capsys, suffix, damage):
    before = {path.name: path.read_bytes() for path in cache.folder.glob("shard_*")}
    damage(cache.folder / f"shard_00001.{suffix}")
    capsys.readouterr()
    TokenCache.build(data, tokenizer)
    assert {path.name: path.read_bytes() for path in cache.folder.glob("shard_*")} == before
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "shard 1" in lines[0] and "damaged" in lines[0] and "1 of 3 shards" in lines[1]


def test_large_vocabulary_takes_four_bytes_a_token(data):
    big = SimpleNamespace(
        vocab_size=70_000,
        bos=69_991,
        fingerprint="big",
        encode_batch=lambda texts, threads: [np.array([65_999], np.uint32) for _ in texts],
    )
    assert next(documents(TokenCache.build(data, big), "val"))[0] == [69_991, 65_999]


@pytest.mark.parametrize(
    "shards, missing",
    [
        ([["only a probe document"], ["val", "test"]], "no document for the train split.* another shard 2"),
        ([["probe", "train"], ["val", None]], "no document for the test split.* the last shard needs 2"),
    ],
)
def test_empty_split_is_refused(data, tmp_path, tokenizer, shards, missing):
    with pytest.raises(UserError, match=missing):
        TokenCache.build(write_shards(tmp_path / "small", shards), tokenizer)


def test_several_ranks_build_once(data, tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    code = f"""if True:
        import sys, torch.distributed as dist
        from pathlib import Path
        from nanochat.common import init_compute
        from nanochat.tokenizer import Tokenizer
        from nanochat.token_cache import TokenCache
        compute, path = init_compute("cpu"), Path({str(tmp_path)!r})
        if compute.rank == 1:
            TokenCache._fill = None    # only rank 0 may
        cache = TokenCache.build(path / "data", Tokenizer.load(path / "tokenizer"), compute)
        assert len(cache.documents("val", 2)[0]) == {len(TEXTS[2]) // 2 + 1}
        dist.destroy_process_group()"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    ranks = [subprocess.Popen([sys.executable, "-c", code], env={**environment, "RANK": str(r)}) for r in range(2)]
    assert [rank.wait(60) for rank in ranks] == [0, 0]


# -----------------------------------------------------------------------------
# packing


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=60), st.integers(1, 15), st.integers(1, 8))
def test_packer_equals_its_slow_twin(lengths, capacity, buffer_size):
    documents = [[(i, j) for j in range(n)] for i, n in enumerate(lengths)]  # every token tells where it comes from
    with pytest.MonkeyPatch.context() as m:
        m.setattr(dataloader, "BUFFER_DOCUMENTS", buffer_size)
        plan = plan_rows(np.array(lengths, dtype=np.int64), capacity)
    pieces = [documents[d][:n] for d, n in zip(plan.documents, plan.lengths)]
    rows = [sum(pieces[a:b], []) for a, b in zip(plan.row_ptr, plan.row_ptr[1:])]
    assert rows == pack_slow(documents, capacity, buffer_size) and len(pieces) == plan.row_ptr[-1]


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_those_of_the_slow_twin_from_any_start(cache, split, tokenizer):
    expected = sum([pack_slow(shard, T + 1, 10) for shard in documents(cache, split)], [])
    rows = Rows(cache, split, T)
    first = len(expected) // 2
    assert rows.fetch(first, len(expected)).tolist() == expected[first:] + expected[:first]  # across shards, wrapped
    assert rows.n_rows == len(expected)
    for n, again in ((1, Rows(cache, split, T)), (3 * len(expected), rows)):  # plans read back; three epochs at once
        assert again.fetch(len(expected) - 1, n).tolist() == (expected[-1:] + expected * 3)[:n]
    assert all(row[0] == tokenizer.bos for row in expected)


def test_probe_documents_never_reach_train(cache, tokenizer):
    def seen(split):
        rows = Rows(cache, split, T)
        text = tokenizer.decode(rows.fetch(0, rows.n_rows).flatten().tolist())
        return {piece.split(" ")[0] for piece in text.split("<|bos|>")[1:] if " " in piece}

    probes = {f"{shard}:{i}" for shard in (0, 1) for i in range(0, len(TEXTS[shard]), PROBE_EVERY)}
    assert seen("probe") and seen("probe") <= probes
    train = seen("train")
    assert len(train) > 100 and not train & probes and not any(name.startswith("2:") for name in train)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-300]),
        lambda path: np.savez(path, documents=np.zeros(3)),
        lambda path: np.savez(path, **{**np.load(path), "lengths": np.load(path)["lengths"][::-1]}),
        lambda path: np.savez(path, **{**np.load(path), "documents": np.load(path)["documents"][::-1]}),
    ],
)
def test_damaged_plan_is_made_again(cache, capsys, damage):
    expected = Rows(cache, "train", T).fetch(0, 30)
    damage(cache.folder / f"plan_train_{T}_00000.npz")
    assert (Rows(cache, "train", T).fetch(0, 30) == expected).all()
    assert "damaged" in capsys.readouterr().out


def test_split_without_a_single_row_is_refused(cache):
    with pytest.raises(UserError, match="one row of 100001 tokens"):
        Rows(cache, "probe", 100_000).fetch(0, 1)


# -----------------------------------------------------------------------------
# the order of a seed


def epoch(cache, seed, split="train"):
    rows = Rows(cache, split, T, seed)
    return rows.fetch(0, rows.n_rows).tolist()


def test_a_seed_is_an_order_of_the_same_rows(cache):
    in_file_order, first, again, other = (epoch(cache, seed) for seed in (None, 1, 1, 2))
    assert first == again
    assert first != other and first != in_file_order
    assert sorted(first) == sorted(other) == sorted(in_file_order)  # each row exactly once an epoch


def test_seeds_differ_in_shards_and_in_rows_of_a_shard(data, cache, tokenizer):
    """With 3 training shards: all shards come first for some seed, and one shard's rows in two orders."""
    write_shards(data.parent / "more", [*TEXTS, make_texts(30, 3)])
    cache = TokenCache.build(data.parent / "more", tokenizer)
    order, rows_of_shard_0 = set(), set()
    for seed in range(12):
        rows = Rows(cache, "train", T, seed)
        total = rows.n_rows
        order.add(tuple(planned.shard for planned in rows._planned))
        rows_of_shard_0.add(next(tuple(p.order) for p in rows._planned if p.shard == 0))
        assert total == Rows(cache, "train", T).n_rows
    assert {shards[0] for shards in order} == {0, 1, 2} and len(rows_of_shard_0) == 12


@pytest.mark.parametrize("seed", [None, 3])
def test_fetch_from_any_position_is_a_part_of_the_epoch_and_wraps_around(cache, seed):
    expected = epoch(cache, seed)
    for first, count in ((0, 1), (7, 30), (len(expected) - 3, 7), (len(expected), 2), (5 * len(expected) + 2, 3)):
        found = Rows(cache, "train", T, seed).fetch(first, count).tolist()
        assert found == [expected[(first + i) % len(expected)] for i in range(count)]


def test_shards_are_planned_when_they_are_needed(cache):
    rows = Rows(cache, "train", T, seed=4)
    rows.fetch(0, 2)
    assert len(rows._planned) == 1
    rows.fetch(rows._ends[-1], 1)
    assert len(rows._planned) == 2


@pytest.mark.parametrize("n", [0, 1, 2, 257])
def test_permutation(n):
    one = permutation(n, 5)
    assert sorted(one) == list(range(n)) and (one == permutation(n, 5)).all()
    assert n < 3 or (one != permutation(n, 6)).any()


def test_permutation_stays_as_it_is():
    """A run that is resumed after an update of numpy must see the same order."""
    assert permutation(8, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


# -----------------------------------------------------------------------------
# the loader


def loader(cache, batch_size=4, **kwargs):
    return DataLoader(cache, "train", batch_size, T, torch.device("cpu"), **kwargs)


def step_rows(loaders, step):
    """The rows of one optimizer step, in the order micro-step, rank, row."""
    batches = [each.get(step, micro) for micro in range(loaders[0].micro_steps) for each in loaders]
    return torch.cat([torch.cat([inputs, targets[:, -1:]], 1) for inputs, targets in batches])


@pytest.mark.parametrize("batch_size, world_size", [(12, 1), (4, 1), (6, 2), (2, 3), (1, 4)])
@pytest.mark.parametrize("seed", [None, 8])
def test_a_steps_rows_do_not_depend_on_ranks_or_batch_size(cache, batch_size, world_size, seed):
    rows = Rows(cache, "train", T, seed)
    loaders = [
        loader(cache, batch_size, rank=r, world_size=world_size, start_row=5, rows_per_step=12, seed=seed)
        for r in range(world_size)
    ]
    for step in (0, 1, 2, 10, 3):  # in order, then a jump ahead and one back, as a resumed run would
        assert (step_rows(loaders, step).numpy() == rows.fetch(5 + 12 * step, 12)).all()
    for each in loaders:
        each.close()


def test_batches_are_shifted_and_contiguous(cache):
    one = loader(cache)
    inputs, targets = one.get(0)
    assert inputs.shape == targets.shape == (4, T) and inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous() and targets.is_contiguous() and (inputs[:, 1:] == targets[:, :-1]).all()
    for (a, b), step in zip(fixed_batches(cache, "train", 4, T, 3, torch.device("cpu"), start_row=4), (1, 2, 3)):
        assert all(map(torch.equal, (a, b), one.get(step)))
    one.close()


def test_thread_prefetches_ends_on_close_and_passes_on_its_errors(cache, monkeypatch):
    one, asked = loader(cache), []
    real = Rows.fetch
    monkeypatch.setattr(Rows, "fetch", lambda self, first, count: asked.append(first) or real(self, first, count))
    first = one.get(0)
    one._thread.join(0.5)  # it never ends by itself: this only gives it time
    assert asked[:2] == [0, 4] and len(asked) >= dataloader.PREFETCH_BATCHES
    thread = one._thread
    one.get(1)
    assert one._thread is thread  # in order, nothing is restarted
    one.close()
    one.close()
    assert not thread.is_alive() and thread not in threading.enumerate()

    monkeypatch.setattr(Rows, "fetch", lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            one.get(1)
    monkeypatch.setattr(Rows, "fetch", real)
    assert torch.equal(one.get(0)[0], first[0])
    one.close()


def test_batches_that_do_not_tile_a_step_are_refused(cache):
    for rows_per_step in (0, 10):
        with pytest.raises(UserError, match="not a multiple of 4 rows a batch x 2 ranks"):
            loader(cache, rank=0, world_size=2, rows_per_step=rows_per_step)
