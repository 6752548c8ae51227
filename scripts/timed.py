"""Run a command with a time limit: SIGTERM when it is up, so that a training run saves, SIGKILL if it does not leave.

    python -m scripts.timed --seconds 600 -- python -m scripts.base_train --resume auto
    python -m scripts.timed --until 1764086400 -- python -m scripts.sweep --what methods      seconds since 1970
    python -m scripts.timed --seconds 600 --record OUT/3_bench -- python -m scripts.bench     OUT/3_bench.json and .txt
    python -m scripts.timed --summary OUT                                                     all records of a folder

The exit status is the command's, or 75 if the limit cut it. A record that says `done` is not run again. Imports nothing
beyond Python's own library: it must be there at once, and where torch is not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

CUT = 75  # as nanochat.preemption.REQUEUE_EXIT_CODE: saved and resumable, run the same command again
GRACE = 60.0  # seconds in which a command may save and leave


def run(command: list[str], seconds: float, text: Path | None) -> tuple[int, bool]:
    """(exit status, whether the limit or a signal cut it). Output goes to the terminal and into `text`."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    asked = threading.Event()

    def stop(*_) -> None:
        if not asked.is_set():
            asked.set()
            process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)  # the command has a session of its own, so a terminal's Ctrl-C does not reach it
    copier = threading.Thread(target=copy, args=(process, text), daemon=True)
    copier.start()
    deadline = time.monotonic() + seconds
    while process.poll() is None and not asked.is_set() and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.poll() is None:
        stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):  # what it started and left behind, too
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    copier.join(5.0)
    return code, asked.is_set() and code != 0


def copy(process: subprocess.Popen, text: Path | None) -> None:
    with open(text or os.devnull, "ab", buffering=0) as file:
        while chunk := os.read(process.stdout.fileno(), 65536):
            file.write(chunk)
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()


def write(path: Path, record: dict) -> None:
    """Atomically: whatever cuts the machine off leaves a whole record."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, path)


def read(path: Path) -> dict:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def summary(folder: Path) -> int:
    """Print and write what became of every step. 0 if all are done, 75 if one was cut, 1 if one failed."""
    records = [r for path in sorted(folder.glob("*.json")) if "outcome" in (r := read(path)) and "step" in r]
    lines = [f"{'step':<24} {'outcome':<8} {'exit':>4} {'seconds':>8} {'limit':>6}"]
    lines += [
        f"{r['step']:<24} {r['outcome']:<8} {'' if r['exit'] is None else r['exit']:>4} {r['seconds']:>8.1f} "
        f"{r['limit']:>6.0f}"
        for r in records
    ]
    (folder / "summary.txt").write_text("\n".join(lines) + "\n")
    write(folder / "summary.json", {"steps": records})
    print("\n".join(lines))
    outcomes = {r["outcome"] for r in records}
    return 1 if "failed" in outcomes else CUT if outcomes - {"done"} else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="the limit")
    parser.add_argument("--until", type=float, help="the limit as a time, in seconds since 1970")
    parser.add_argument("--record", type=Path, help="write PATH.json and PATH.txt")
    parser.add_argument("--summary", type=Path, help="only this: the records of a folder")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.summary:
        return summary(args.summary)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command or (args.seconds is None) == (args.until is None):
        parser.error("give --seconds or --until, and a command after --")
    seconds = args.seconds if args.until is None else args.until - time.time()
    if not args.record:
        if seconds <= 0:
            return CUT
        code, cut = run(command, seconds, None)
        return CUT if cut else code

    record_path, text = args.record.with_suffix(".json"), args.record.with_suffix(".txt")
    if read(record_path).get("outcome") == "done":
        print(f"{args.record.name}: done before")
        return 0
    args.record.parent.mkdir(parents=True, exist_ok=True)
    begin = time.time()
    record = {"step": args.record.name, "command": shlex.join(command), "limit": seconds, "begin": begin}
    write(record_path, {**record, "outcome": "running", "exit": None, "seconds": 0.0})
    try:
        code, cut = run(command, seconds, text)
    except OSError as e:
        text.write_text(f"{e}\n")
        code, cut = 127, False
    outcome = "cut" if cut or code == CUT else "done" if code == 0 else "failed"
    write(record_path, {**record, "outcome": outcome, "exit": code, "seconds": time.time() - begin})
    return CUT if outcome == "cut" else code


if __name__ == "__main__":
    sys.exit(main())
