"""The clips' table in a real PostgreSQL, which the test starts, where there is one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from patchpipe.serve.clips.store import Store

BIN = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
INITDB = shutil.which("initdb") or (str(BIN / "initdb") if BIN and (BIN / "initdb").exists() else None)
USER = "nobody" if os.geteuid() == 0 else None  # it does not run as root

pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.skipif(INITDB is None, reason="needs PostgreSQL's server"),
    pytest.mark.skipif(importlib.util.find_spec("psycopg") is None, reason="needs psycopg"),
]


@pytest.fixture
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own, on a socket in a folder of its own."""
    assert INITDB is not None
    folder = Path(tmp_path_factory.getbasetemp()) / "pg"
    data, run = folder / "data", folder / "run"
    for place in (folder, data, run):
        place.mkdir(mode=0o700)
    if USER is not None:
        for place in (*tmp_path_factory.getbasetemp().parents, tmp_path_factory.getbasetemp()):
            if place.owner() == "root" and place != Path("/") and place != Path("/tmp"):
                place.chmod(place.stat().st_mode | 0o011)
        for place in (folder, data, run):
            shutil.chown(place, USER)
    as_user = {"user": USER, "cwd": folder, "check": True, "capture_output": True}
    subprocess.run([INITDB, "-D", data, "-U", "patchpipe", "--auth", "trust", "--no-sync"], **as_user)  # type: ignore[call-overload]
    control = str(Path(INITDB).with_name("pg_ctl"))
    options = f"-k {run} -c listen_addresses='' -c fsync=off"
    log = {**as_user, "capture_output": False, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([control, "-D", data, "-o", options, "-w", "-l", folder / "log", "start"], **log)  # type: ignore[call-overload]
    try:
        yield f"postgresql+psycopg://patchpipe@/postgres?host={run}"
    finally:
        subprocess.run([control, "-D", data, "-m", "immediate", "stop"], **log)  # type: ignore[call-overload]


def test_clips_are_kept_in_postgres(url: str) -> None:
    store = Store(url)
    fields = {
        "status": "queued", "progress": 0, "model": "wan", "prompt": "näive ☂", "size": None, "seconds": 2.5,
        "frames_per_second": 8.0, "created_at": 1.0, "attempts": 0,
        "work": {"arguments": {"prompt": "☂"}, "seeds": [1]},
    }  # fmt: skip
    for name in ("a", "b", "c"):
        store.add(id=name, **fields)
    assert store.change("a", status="completed", progress=100, completed_at=2.0, expires_at=3.0)
    assert store.change("b", status="in_progress", error={"code": "x", "message": "y"})
    store.close()
    again = Store(url)  # after a restart
    assert [one.id for one in again.unfinished()] == ["b", "c"]
    assert [one.id for one in again.expired(4.0)] == ["a"]
    found = again.get("b")
    assert found is not None
    assert (found.prompt, found.error, found.work["seeds"]) == ("näive ☂", {"code": "x", "message": "y"}, [1])
    page = again.page("c", 1, True)
    assert page is not None
    assert ([one.id for one in page[0]], page[1]) == (["b"], True)
    assert again.delete("b")
    assert not again.change("b", progress=1)
    again.close()
    with pytest.raises(ValueError, match="cannot be opened"):
        Store(url.replace("/postgres?", "/nowhere?"))
