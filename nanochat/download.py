"""Downloading large files; a download can be stopped at any moment and continued later.

A file grows under `<name>.partial` and gets its own name when it is complete: of the right size, of the right sha256
where the server sends one, accepted by the caller's check, and on disk.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Event, Lock

import requests
from tqdm import tqdm

from nanochat.common import UserError

ATTEMPTS = 6  # for one file
GIVE_UP = 4  # after so many failed files in a row the server or the network must be down; the others are not tried
LONGEST_WAIT = 600.0  # seconds between two attempts, even if Retry-After asks for more
TIMEOUT = (10, 30)  # seconds to connect, and between two packets
CHUNK = 1 << 20  # bytes


class Permanent(Exception):
    """Trying again cannot help."""


class Transient(Exception):
    """Trying again may help, but not before `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


class Stopped(Exception):
    """All downloads are being stopped; the partial file stays."""


class Progress:
    """One bar, in bytes, for all files. Until its first reply, a file counts as being of mean size."""

    def __init__(self, files: int):
        self._files, self._lock, self._done, self._sizes = files, Lock(), {}, {}
        self.bar = tqdm(unit="B", unit_scale=True, mininterval=1 if sys.stderr.isatty() else 30)

    def report(self, name: str, done: int, size: int | None) -> None:
        """`done` of `size` bytes (None: unknown) of a file have arrived."""
        with self._lock:
            self._done[name] = done
            if size is not None:
                self._sizes[name] = size
                self.bar.total = sum(self._sizes.values()) * self._files // len(self._sizes)
            self.bar.update(sum(self._done.values()) - self.bar.n)  # negative when a file starts again


def download_files(
    base_url: str, names: list[str], folder: Path, check: Callable[[Path], object], workers: int = 4
) -> None:
    """Download `base_url/name` to `folder/name` for each name that is missing there, `workers` at a time.

    `check(path)` raises `UserError` for a file that arrived but is not what it should be. Raises `UserError` with the
    files that failed; what has arrived stays, and the next call continues from there.
    """
    if workers < 1:
        raise UserError(f"--workers {workers}: give 1 or more")
    if not base_url.startswith(("http://", "https://")):
        raise UserError(f"{base_url!r} is not an address to download from; it must begin with http:// or https://")
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not (folder / name).exists()]
    stop, failed, in_a_row = Event(), {}, 0
    progress = Progress(len(missing))
    with progress.bar, ThreadPoolExecutor(workers) as pool:
        jobs = {
            pool.submit(fetch, f"{base_url.rstrip('/')}/{name}", folder / name, check, stop, progress): name
            for name in missing
        }
        try:
            for job in as_completed(jobs):
                error = job.exception()
                if error is None:
                    in_a_row = 0
                elif isinstance(error, (Permanent, OSError)):
                    failed[jobs[job]] = str(error)
                    in_a_row += 1
                    if in_a_row == GIVE_UP:
                        stop.set()
                elif not isinstance(error, Stopped):
                    raise error
        finally:
            stop.set()  # on Ctrl-C the workers end at their next chunk, and the pool waits for them
    if failed:
        untried = sum(not (folder / name).exists() for name in missing) - len(failed)
        raise UserError(
            f"{len(failed)} of {len(missing)} files failed: "
            + ", ".join(f"{name} ({why})" for name, why in sorted(failed.items()))
            + (f"; {untried} more were not finished" if untried else "")
            + "; run the same command again to continue"
        )


def fetch(url: str, target: Path, check: Callable[[Path], object], stop: Event, progress: Progress) -> None:
    """Download one file, with retries and exponential back-off; raises `Permanent`, `Stopped` or `OSError` (disk)."""
    partial = target.with_name(target.name + ".partial")
    for attempt in range(1, ATTEMPTS + 1):
        if stop.is_set():
            raise Stopped
        try:
            verify(partial, transfer(url, partial, stop, progress), check)
            return os.replace(partial, target)
        except Transient as e:
            why, retry_after = str(e), e.retry_after
        except requests.RequestException as e:  # dropped connections, timeouts, name resolution
            why, retry_after = type(e).__name__, 0.0
        if attempt < ATTEMPTS:
            wait = max(retry_after, 2 ** (attempt - 1) * random.uniform(0.5, 1.5))  # jitter: workers spread out
            progress.bar.write(f"{target.name}: {why}; trying again in {wait:.0f} s", file=sys.stderr)
            stop.wait(wait)
    raise Permanent(f"{why}, {ATTEMPTS} times")


def transfer(url: str, partial: Path, stop: Event, progress: Progress) -> str | None:
    """Append to `partial` what is missing of `url`; returns the sha256 of the whole file, if the server sends it."""
    have = partial.stat().st_size if partial.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # sizes and ranges are to be those of the file itself
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as reply:
        status = f"{reply.status_code} {reply.reason}"
        if reply.status_code == 416:  # the partial file is not shorter than the file: it belongs to another version
            partial.unlink(missing_ok=True)
            raise Transient("the partial file does not fit the server's file; starting again")
        if reply.status_code in (408, 425, 429) or reply.status_code >= 500:
            raise Transient(status, retry_after_seconds(reply.headers.get("Retry-After")))
        if not reply.ok:
            raise Permanent(status)
        if reply.status_code == 206:
            given = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", reply.headers.get("Content-Range", ""))
            if not given or int(given[1]) != have:
                partial.unlink(missing_ok=True)
                raise Transient("the server sent another range than the one asked for; starting again")
            size = int(given[2])
        else:  # the whole file, even if a range was asked for
            have, size = 0, int(reply.headers["Content-Length"]) if "Content-Length" in reply.headers else None
        with open(partial, "ab" if have else "wb") as f:
            for chunk in reply.iter_content(CHUNK):
                if stop.is_set():
                    raise Stopped
                f.write(chunk)
                progress.report(partial.name, f.tell(), size)
            f.flush()
            os.fsync(f.fileno())
            if size is not None and f.tell() != size:
                raise Transient(f"{f.tell()} of {size} bytes arrived")
        return sha256_from_headers(reply)


def verify(partial: Path, sha256: str | None, check: Callable[[Path], object]) -> None:
    """Delete the file and raise `Transient` or `Permanent` if its hash is wrong or `check` rejects it."""
    if sha256 and file_sha256(partial) != sha256:
        partial.unlink()
        raise Transient("its sha256 is not the one the server sent")
    try:
        check(partial)
    except UserError as e:
        partial.unlink()
        what = str(e).partition(";")[0]  # without the advice
        raise (Permanent if sha256 else Transient)(
            what
        ) from None  # with the right hash, the next attempt would get the same


def sha256_from_headers(reply: requests.Response) -> str | None:
    """The file's sha256, if a header has it.

    Hugging Face sends it as `X-Linked-Etag` with the redirect to its CDN. The CDN's own `ETag` has 64 hex digits too
    but is another hash, so a plain `ETag` is used only if there was no redirect.
    """
    tags = [r.headers.get("X-Linked-Etag", "") for r in [*reply.history, reply]]
    if not reply.history:
        tags.append(reply.headers.get("ETag", ""))
    digests = [tag.strip('"').lower() for tag in tags]
    return next((digest for digest in digests if re.fullmatch("[0-9a-f]{64}", digest)), None)


def file_sha256(path: Path) -> str:
    """The sha256 (hex) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def retry_after_seconds(value: str | None) -> float:
    """The value of `Retry-After`, seconds or an HTTP date (RFC 9110, 10.2.3), in seconds; 0 if absent or malformed."""
    if value is None:
        return 0.0
    try:
        seconds = float(value) if value.strip().isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT)
