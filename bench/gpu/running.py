"""Runs a part as a process of its own, ended with all its children when its time is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.gpu.catalogue import Part
from bench.gpu.machine import ROOT
from bench.gpu.part import SKIPPED
from bench.gpu.setting import Setting, read_rows

LOOK_SECONDS = 0.2
TAIL_LINES = 30


def run_part(
    part: Part,
    setting: Setting,
    env: dict[str, str],
    limit: float,
    scratch: Path,
    seen: Callable[[list[dict[str, Any]]], None],
) -> dict[str, Any]:
    """Runs one part.

    Args:
        part: The part.
        setting: Where it runs.
        env: Its environment.
        limit: Seconds it may take.
        scratch: A folder for what it writes.
        seen: Told of all rows so far whenever there is a new one.

    Returns:
        ``title``, ``seconds``, ``rows``, ``status`` (``done``, ``wrong``, ``failed``, ``out of time`` or ``skipped``),
        and ``why`` where it is not done.
    """
    rows_file, log = scratch / f"{part.letter}.jsonl", scratch / f"{part.letter}.log"
    rows_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.gpu.part", part.module, setting.as_text(), str(rows_file)]
    started, count = time.monotonic(), 0
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None and time.monotonic() - started < limit:
                time.sleep(LOOK_SECONDS)
                rows = read_rows(rows_file)
                if len(rows) != count:
                    count = len(rows)
                    seen(rows)
            status = process.poll()
        finally:
            _end(process)
    rows = read_rows(rows_file)
    seen(rows)
    found = {"title": part.title, "seconds": round(time.monotonic() - started, 1), "rows": rows}
    return {**found, **_judged(status, rows, limit, _tail(log))}


def _judged(status: int | None, rows: list[dict[str, Any]], limit: float, tail: list[str]) -> dict[str, Any]:
    """How a part went, from its exit status (``None``: it did not end by itself) and its rows."""
    if status == SKIPPED:
        return {"status": "skipped", "why": tail[-1] if tail else "no reason was given"}
    if status is None:
        last = f"after {rows[-1]['title']!r}" if rows else "before its first row"
        return {"status": "out of time", "why": f"ended after {limit:.0f} s, {last}", "tail": tail}
    if status:
        return {"status": "failed", "why": tail[-1] if tail else f"exit status {status}", "tail": tail}
    wrong = [row["title"] for row in rows if row["ok"] is False]
    if wrong:
        return {"status": "wrong", "why": f"not as it must be: {'; '.join(wrong)}", "tail": tail}
    return {"status": "done"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the part and whatever it has started, which is in its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path) -> list[str]:
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines()]
    return [line for line in lines if line.strip()][-TAIL_LINES:]
