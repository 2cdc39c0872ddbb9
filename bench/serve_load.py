"""Many clients at once at a real service: what became of every request, and what each process's memory did.

python -m bench.serve_load --clients 200 --minutes 2
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx2
import psutil
import typer
from PIL import Image
from rich.console import Console

from bench.rounds import save

SIZES = ("64x64", "96x64", "64x96", "96x96", "128x128")
STEPS = (2, 4, 6, 8)
PATIENCE = 600.0  # seconds a client waits for its answer
SAMPLE = 2.0  # seconds between looks at the processes
SETTLED = 0.25  # share of the run after which memory should be flat


@dataclass
class Tally:
    """What became of the requests.

    Attributes:
        counts: By outcome.
        lost: What happened to those that got no answer.
        seconds: Of those that were answered, from the request to the picture.
    """

    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def main(
    clients: Annotated[int, typer.Option(help="Clients at once.")] = 200,
    minutes: Annotated[float, typer.Option(help="Minutes in which they ask.")] = 2.0,
    leaving: Annotated[float, typer.Option(help="Share of requests whose client leaves before the answer.")] = 0.15,
    streams: Annotated[float, typer.Option(help="Share of requests that are streams.")] = 0.2,
    waiting: Annotated[int, typer.Option(help="Requests that may wait in the service.")] = 64,
    seed: Annotated[int, typer.Option(help="Of chance.")] = 1,
) -> None:
    """Measures, prints and writes bench/results."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        process, address = started(Path(folder), waiting)
        watch = Watch(process.pid)
        try:
            console.print(f"{address}: {', '.join(watch.names.values())}")
            load = os.getloadavg()[0]
            watch.start()
            tally = asyncio.run(asked_by_all(address, clients, minutes * 60, leaving, streams, seed))
            figures = {
                "clients": clients,
                "minutes": minutes,
                **told(tally, address),
                "processes": watch.stop(),
                "load_average": [load, os.getloadavg()[0]],
            }
        finally:
            process.terminate()
            ended = process.wait(120)
        figures["exit_status"] = ended
        console.print(figures)
        command = f"python -m bench.serve_load --clients {clients} --minutes {minutes:g}"
        save("serve-load", command, figures)
    if figures["lost"]:
        raise SystemExit(f"{figures['lost']} requests were lost")


def started(folder: Path, waiting: int) -> tuple[subprocess.Popen[str], str]:
    """A service of its own process: the bundled model on two workers."""
    command = [sys.executable, "-m", "patchpipe", "serve", "--layout", "elastic", "--devices", "cpu,cpu"]
    command += ["--threads", "1", "--port", "0", "--folder", str(folder), "--max-waiting", str(waiting)]
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        command, env={**os.environ, "COLUMNS": "200"}, text=True, stdout=subprocess.PIPE, stderr=log
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "listening on" in line:
            return process, line.split()[-1]
    raise SystemExit((folder / "log").read_text())


# -- clients ---------------------------------------------------------------------------------------


async def asked_by_all(address: str, clients: int, seconds: float, leaving: float, streams: float, seed: int) -> Tally:
    """Lets all clients ask until the time is over, and waits for their last answers."""
    tally, until = Tally(), time.monotonic() + seconds
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(base_url=address, timeout=PATIENCE, limits=limits) as connection:
        own = [random.Random(f"{seed}/{number}") for number in range(clients)]
        await asyncio.gather(*(one_client(connection, tally, until, chance, leaving, streams) for chance in own))
    return tally


async def one_client(
    connection: httpx2.AsyncClient, tally: Tally, until: float, chance: random.Random, leaving: float, streams: float
) -> None:
    """Asks, waits for the answer, and asks again; comes back when it is told to."""
    while time.monotonic() < until:
        size = chance.choice(SIZES)
        body: dict[str, Any] = {"prompt": "red heart, flat style", "size": size, "seed": chance.randrange(1000)}
        body |= {"num_inference_steps": chance.choice(STEPS), "stream": chance.random() < streams}
        leaves = chance.uniform(0.1, 20.0) if chance.random() < leaving else None
        tally.counts["asked"] += 1
        began = time.monotonic()
        try:
            asking = ask(connection, body)
            status, again = await (asking if leaves is None else asyncio.wait_for(asking, leaves))
        except (TimeoutError, asyncio.TimeoutError):
            tally.counts["left"] += 1
            continue
        except Exception as error:  # nobody answered, or not to the end
            tally.counts["lost"] += 1
            tally.lost.append(f"{type(error).__name__}: {error}")
            continue
        tally.counts["answered" if status == 200 else f"refused {status}"] += 1
        if status == 200:
            tally.seconds.append(time.monotonic() - began)
        await asyncio.sleep(min(again, max(0.0, until - time.monotonic())))


async def ask(connection: httpx2.AsyncClient, body: dict[str, Any]) -> tuple[int, float]:
    """Asks for one picture.

    Returns:
        The status, and the seconds after which to come again.

    Raises:
        Exception: There is no answer, or it is not the picture that was asked for.
    """
    async with connection.stream("POST", "/v1/images/generations", json=body) as answer:
        content = await answer.aread()
    if answer.status_code != 200:
        return answer.status_code, float(answer.headers.get("retry-after", 1))
    if body["stream"]:
        [event] = [block for block in content.decode().split("\n\n") if "image_generation.completed" in block]
        encoded = event.split('"b64_json": "')[1].split('"')[0]
    else:
        encoded = answer.json()["data"][0]["b64_json"]
    width, height = Image.open(io.BytesIO(base64.b64decode(encoded))).size
    if f"{width}x{height}" != body["size"]:
        raise ValueError(f"the picture is {width}x{height}, not {body['size']}")
    return 200, 0.0


def told(tally: Tally, address: str) -> dict[str, Any]:
    """The clients' counts beside the service's own, once nothing is left in it."""
    deadline = time.monotonic() + 120
    while left(address) and time.monotonic() < deadline:
        time.sleep(0.2)
    figures = httpx2.get(f"{address}/metrics").text.splitlines()
    outcomes = {
        line.split('outcome="')[1].split('"')[0]: int(float(line.split()[-1]))
        for line in figures
        if line.startswith("patchpipe_requests_total")
    }
    seconds = sorted(tally.seconds) or [0.0]
    return {
        "requests": dict(tally.counts),
        "service": {"accepted": sum(outcomes.values()), **outcomes, "left over": left(address)},
        # A client that left may have done so when its picture was made and on its way.
        "lost": tally.counts["lost"] + max(0, tally.counts["answered"] - outcomes.get("completed", 0)) + left(address),
        "lost_how": tally.lost[:20],
        "answer_seconds": {"median": median(seconds), "p99": seconds[int(0.99 * (len(seconds) - 1))]},
    }


def left(address: str) -> int:
    """Requests that the service still has."""
    state = httpx2.get(f"{address}/v1/state", timeout=60).json()
    return sum(len(state[name]) for name in ("running", "paused", "waiting"))


# -- processes -------------------------------------------------------------------------------------


class Watch:
    """Looks at a service's processes while clients ask.

    Args:
        pid: The service's process.

    Attributes:
        names: What each process is.
    """

    def __init__(self, pid: int) -> None:
        service = psutil.Process(pid)
        self._processes = [service, *service.children(recursive=True)]
        self.names = {one.pid: _role(one, service) for one in self._processes}
        self._samples: dict[int, list[tuple[float, float, int]]] = {one.pid: [] for one in self._processes}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self) -> list[dict[str, Any]]:
        """Each process's memory in MiB and open files, over the run; growth is between its settled part's thirds."""
        self._over.set()
        self._thread.join()
        return [{"process": name, **_summary(self._samples[pid])} for pid, name in self.names.items()]

    def _look(self) -> None:
        began = time.monotonic()
        while not self._over.wait(SAMPLE):
            for one in self._processes:
                try:
                    row = (time.monotonic() - began, one.memory_info().rss / 2**20, one.num_fds())
                except psutil.NoSuchProcess:
                    continue
                self._samples[one.pid].append(row)


def _role(process: psutil.Process, service: psutil.Process) -> str:
    if process == service:
        return "service"
    return "fork server" if process.children() else f"worker {process.pid}"


def _summary(samples: list[tuple[float, float, int]]) -> dict[str, Any]:
    settled = samples[int(SETTLED * len(samples)) :]
    third = max(1, len(settled) // 3)
    memory = [row[1] for row in settled]
    return {
        "seen": len(samples),
        "mib": {"first": samples[0][1], "settled": median(memory[:third]), "last": median(memory[-third:])},
        "grown_mib": median(memory[-third:]) - median(memory[:third]),
        "most_mib": max(row[1] for row in samples),
        "files": {"first": samples[0][2], "last": samples[-1][2], "most": max(row[2] for row in samples)},
        "series": [[round(when), round(mib, 1)] for when, mib, _ in samples[:: max(1, len(samples) // 40)]],
    }


if __name__ == "__main__":
    typer.run(main)
