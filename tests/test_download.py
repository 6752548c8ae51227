"""The downloader against a server on loopback, which fails in the ways that a test chooses."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from collections import defaultdict
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset, download
from nanochat.common import UserError

A, B = "shard_00000.parquet", "shard_00001.parquet"
OTHER_HASH = "0" * 64


class Handler(BaseHTTPRequestHandler):
    """Each request takes the next fault planned for its file, a status or a way of sending; after those it succeeds."""

    def do_GET(self):
        name, wanted = self.path.rpartition("/")[2], self.headers.get("Range")
        self.server.seen.append((name, wanted))
        plan, body = self.server.plan[name], self.server.files.get(name)
        act = 404 if body is None else plan.pop(0) if plan else "ok"
        digest = hashlib.sha256(body or b"").hexdigest()
        if isinstance(act, tuple):
            return self.answer(act[0], b"", **{"Retry-After": act[1]})
        if isinstance(act, int):
            return self.answer(act, b"<html>no</html>")
        if act in ("redirect", "bare redirect"):
            linked = {"X-Linked-Etag": f'"{digest}"'} if act == "redirect" else {}
            return self.answer(302, b"", Location=f"/cdn/{name}", **linked)
        etag = OTHER_HASH if self.path.startswith("/cdn/") else digest
        start = int(wanted[len("bytes=") : -1]) if wanted and act != "no range" else 0
        if start >= len(body):
            return self.answer(416, b"", **{"Content-Range": f"bytes */{len(body)}"})
        if act == "corrupt":
            at = len(body) * 3 // 4
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        if act == "half":  # and claims that this is all
            return self.answer(200, body[: len(body) // 2])
        headers = {"ETag": f'"{etag}"'} if act != "no hash" else {}
        if act == "other range":
            start += 10
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if act == "short range":
            return self.answer(206, body[start : start + 10], **headers)
        cut = len(body) // 2 if act in ("drop", "hang") else len(body)
        self.answer(206 if start else 200, body[start:cut], length=len(body) - start, **headers)
        if act == "hang":
            self.wfile.flush()
            self.server.released.wait(10)
            self.wfile.write(body[cut:])

    def answer(self, status, body, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def parquet_bytes(seed: int) -> bytes:
    rng = random.Random(seed)
    texts = [rng.randbytes(1000).hex() for _ in range(40)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(download, "CHUNK", 4096)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files = {A: parquet_bytes(0), B: parquet_bytes(1)}
    server.plan, server.seen = defaultdict(list), []
    server.released = Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def waits(monkeypatch):
    """The seconds that back-off asked for; none of them is waited."""
    asked = []

    class Quick(Event):
        def wait(self, timeout=None):
            asked.append(timeout)
            return self.is_set()

    monkeypatch.setattr(download, "Event", Quick)
    return asked


def get(server, folder, names=(A,), **kwargs):
    download.download_files(server.url, list(names), folder, check=dataset.open_shard, **kwargs)


def assert_whole(server, folder, names=(A,)):
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)
    assert all((folder / name).read_bytes() == server.files[name] for name in names)


def test_downloads_once(server, waits, tmp_path):
    get(server, tmp_path, (A, B))
    get(server, tmp_path, (A, B))
    assert_whole(server, tmp_path, (A, B))
    assert len(server.seen) == 2 and waits == []


@pytest.mark.parametrize(
    "plan, requests, continued",
    [
        (["drop"], 2, True),
        (["drop", "drop", 500], 4, True),
        (["drop", "no range"], 2, True),
        (["drop", "corrupt"], 3, False),
        (["drop", "short range"], 3, True),
        (["drop", "other range"], 3, False),
        (["half"], 2, False),
        (["corrupt"], 2, False),
        (["no hash"], 1, False),
        ([429, 503, 408, 500], 5, False),
        (["redirect"], 2, False),
        (["redirect", "drop", "redirect"], 4, True),
        (["bare redirect"], 2, False),
        (["redirect", "corrupt", "redirect"], 4, False),
    ],
    ids=str,
)
def test_survives(server, waits, tmp_path, plan, requests, continued):
    server.plan[A] = list(plan)
    get(server, tmp_path)
    assert_whole(server, tmp_path)
    last_range = server.seen[-1][1]
    assert len(server.seen) == requests and (last_range is not None) == continued


def test_dropped_download_continues(server, waits, tmp_path):
    server.plan[A] = ["drop"]
    get(server, tmp_path)
    (_, first), (_, second) = server.seen
    assert first is None and int(second[len("bytes=") : -1]) >= len(server.files[A]) // 2 - download.CHUNK
    assert len(waits) == 1


@pytest.mark.parametrize("left", [b"x" * 5000, b"x" * 500_000, "all"], ids=["other start", "longer", "all"])
def test_partial_file_from_earlier(server, waits, tmp_path, left):
    (tmp_path / f"{A}.partial").write_bytes(server.files[A] if left == "all" else left)
    get(server, tmp_path)
    assert_whole(server, tmp_path)


def test_retry_after_is_honoured(server, waits, tmp_path):
    server.plan[A] = [(429, "70"), (503, "80"), (429, "nonsense")]
    get(server, tmp_path)
    assert waits[:2] == [70, 80] and 2 <= waits[2] <= 6


def test_retry_after_values():
    seconds = download.retry_after_seconds
    assert seconds(None) == seconds("soon") == seconds(formatdate(time.time() - 60, usegmt=True)) == 0
    assert seconds("7") == 7 and seconds("99999") == download.LONGEST_WAIT
    assert 50 < seconds(formatdate(time.time() + 60, usegmt=True)) <= 60


def test_back_off_grows_and_ends(server, waits, tmp_path):
    server.plan[A] = [500] * download.ATTEMPTS
    with pytest.raises(UserError, match=rf"1 of 2 files failed: {A} \(500 .*6 times\).*again to continue"):
        get(server, tmp_path, (A, B))
    assert len(waits) == download.ATTEMPTS - 1
    assert all(2**i * 0.5 <= wait <= 2**i * 1.5 for i, wait in enumerate(waits))
    get(server, tmp_path, (A, B))
    assert_whole(server, tmp_path, (A, B))


@pytest.mark.parametrize("act, why", [("corrupt", "sha256"), ("half", "parquet"), ("drop", "ChunkedEncodingError")])
def test_never_whole_never_named(server, waits, tmp_path, act, why):
    server.plan[A] = [act] * 99
    with pytest.raises(UserError, match=why):
        get(server, tmp_path)
    assert not (tmp_path / A).exists()


def test_wrong_file_with_the_right_hash_is_not_tried_again(server, waits, tmp_path):
    server.files[A] = b"no parquet" * 1000
    with pytest.raises(UserError, match="cannot be read as parquet"):
        get(server, tmp_path)
    assert len(server.seen) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [401, 403, 404])
def test_permanent_errors_are_not_tried_again(server, waits, tmp_path, status):
    server.plan[A] = [status]
    with pytest.raises(UserError, match=rf"1 of 2 files failed: {A} \({status} "):
        get(server, tmp_path, (A, B))
    assert_whole(server, tmp_path, (B,))
    assert sorted(name for name, _ in server.seen) == [A, B] and waits == []


def test_gives_up_when_everything_fails(server, waits, tmp_path):
    names = [f"shard_{i:05d}.parquet" for i in range(100, 130)]
    with pytest.raises(UserError, match="of 30 files failed.*more were not finished"):
        get(server, tmp_path, names, workers=1)
    assert download.GIVE_UP <= len(server.seen) < 30


def test_no_server(waits, monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(UserError, match="ConnectionError"):
        download.download_files("http://127.0.0.1:9", [A], tmp_path, check=dataset.open_shard)


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the shell that started the tests has it ignored, as it has for background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_leaves_partial_files_only(server, interruptible, tmp_path):
    server.plan[A], server.plan[B] = ["hang"], ["hang"]

    def interrupt():
        while not any(p.stat().st_size for p in tmp_path.iterdir()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        server.released.set()

    Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path, (A, B))
    left = {p.name for p in tmp_path.iterdir()}
    assert left and left <= {f"{A}.partial", f"{B}.partial"}
    get(server, tmp_path, (A, B))
    assert_whole(server, tmp_path, (A, B))


@pytest.mark.parametrize("url, workers", [("ftp://host", 1), ("shards", 1), ("http://host", 0)])
def test_bad_arguments(tmp_path, url, workers):
    with pytest.raises(UserError):
        download.download_files(url, [A], tmp_path / "new", check=dataset.open_shard, workers=workers)
    assert not (tmp_path / "new").exists()


def test_command_line(server, waits, tmp_path, monkeypatch, capsys):
    def prepare(*flags):
        monkeypatch.setattr(sys, "argv", ["dataset", *flags, "--url", server.url])
        dataset.main()

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    last = dataset.SHARD_NAME.format(dataset.FINEWEB_LAST)
    with pytest.raises(UserError, match=last):
        prepare("-n", "1")
    with pytest.raises(UserError, match="-n 8"):  # a training shard must not pass for the validation shard
        dataset.resolve_data("fineweb-edu")
    server.files[last] = parquet_bytes(2)
    prepare("-n", "2", "-w", "2")
    assert_whole(server, tmp_path / "data" / "fineweb-edu", (A, B, last))
    assert dataset.split_shards(dataset.resolve_data("fineweb-edu"))[1].name == last
    assert "3 shards" in capsys.readouterr().out
    with pytest.raises(UserError, match="1 to 1822"):
        prepare("-n", "1823")
