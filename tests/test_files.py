"""Files are replaced as a whole or not at all, and JSON that cannot be read is one clear line."""

from __future__ import annotations

import os
import threading

import pytest

from nanochat.common import UserError
from nanochat.files import atomic_file, locked, read_json, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_reader_sees_the_old_contents_until_the_new_are_complete(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    with atomic_file(path) as f:
        f.write(b"first")
    with atomic_file(path) as f:
        f.write(b"sec")
        assert path.read_bytes() == b"first"
        f.write(b"ond")
    assert path.read_bytes() == b"second" and names(path.parent) == ["a.bin"]


def test_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    write_json(tmp_path / "a.json", [1])
    assert events == ["fsync", "replace"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_changes_nothing(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        with atomic_file(path) as f:
            f.write(b"half")
            raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


def test_json_returns_as_it_was(tmp_path):
    value = {"a": [1, 2.5, None, "ü"], "b": {}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_text().endswith("\n")


def test_what_json_cannot_express_leaves_the_file_alone(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert read_json(tmp_path / "a.json") == 1 and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("contents", [None, b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_json_that_cannot_be_read_is_one_line(tmp_path, contents):
    path = tmp_path / "a.json"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(UserError, match=f"the card {path}") as e:
        read_json(path, "the card")
    assert "\n" not in str(e.value)


def test_one_at_a_time_in_a_locked_folder(tmp_path):
    """flock locks belong to open files, so that threads exclude each other as processes do."""
    inside, most = [], []

    def work():
        for _ in range(20):
            with locked(tmp_path / "new"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 80 and max(most) == 1
