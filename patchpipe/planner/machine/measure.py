"""Measures this machine: how fast a device computes on few and many tokens, and how fast ranks reach each other."""

from __future__ import annotations

import math
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.nn import functional

from patchpipe.distributed.exchange import Exchange
from patchpipe.distributed.process_groups import ProcessGroups
from patchpipe.distributed.transport import Wire
from patchpipe.planner.machine.devices import HOST, Device
from patchpipe.planner.machine.links import Link

Progress = Callable[[str], None]
CPU_ROWS, CUDA_ROWS = (16, 64, 256, 1024), (64, 256, 1024, 4096)
CPU_WIDTH, CUDA_WIDTH = 512, 3072
HEAD_CHANNELS = 64
COPIED = 64 * 2**20
WEIGHTS = 128 * 2**20  # bytes: more than the caches hold
CALLS = 64
MESSAGES = (2**10, 2**24)  # bytes: one tells the latency, the other the bandwidth
TASKS_DEVICE, TASKS_LINK = 4, 2
DEADLINE = 60.0
SLOWER = 3.0  # times the seconds of the fastest send: over another kind of link
CPU_INTERFERENCE, CUDA_INTERFERENCE = 1.0, 0.5  # a CPU's transfers are copies by the cores that compute


def measure_device(place: torch.device, ranks: int, threads: int | None, progress: Progress) -> Device:
    """Measures one device.

    Args:
        place: The CPU, or a CUDA device.
        ranks: Ranks that share the host's memory, where it is the CPU.
        threads: CPU threads of a rank; ``None`` shares the cores out evenly.
        progress: Told what is done.
    """
    kept = torch.get_num_threads()
    cpu = place.type == "cpu"
    torch.set_num_threads(threads or (max(1, (os.cpu_count() or 1) // ranks) if cpu else kept))
    try:
        launch, bandwidth = _launch(place), _bandwidth(place)
        upload = bandwidth / 2 if cpu else _upload(place)  # on a CPU every byte is read and written
        progress("operations and memory")
        rate, fill = _products(place, launch)
        progress("matrix products")
        attention = _attention_rate(place)
        progress("attention")
        name = _name(place, torch.get_num_threads())
    finally:
        torch.set_num_threads(kept)
    blended = 2 / (1 / rate + 1 / attention)  # half and half, as in FLUX.1 at 2048 pixels
    progress("device")
    found = name, blended, 1.0, _memory(place, ranks), bandwidth, fill, launch
    return Device(*found, "measured by patchpipe profile", host=0.0 if cpu else HOST, upload=upload)


def _name(place: torch.device, threads: int) -> str:
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def _memory(place: torch.device, ranks: int) -> int:
    if place.type == "cuda":
        return torch.cuda.get_device_properties(place).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks


def _dtype(place: torch.device) -> torch.dtype:
    return torch.bfloat16 if place.type == "cuda" else torch.float32


def _seconds(place: torch.device, work: Callable[[], object], repeats: int = 7, inner: int = 1) -> float:
    """Median seconds of a piece of work, after two untimed runs."""
    spent = []
    for turn in range(repeats + 2):
        _wait(place)
        began = perf_counter()
        for _ in range(inner):
            work()
        _wait(place)
        if turn >= 2:
            spent.append((perf_counter() - began) / inner)
    return median(spent)


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def _launch(place: torch.device) -> float:
    small = torch.ones(64, device=place)
    return _seconds(place, lambda: small.add_(1.0), inner=200)


def _bandwidth(place: torch.device) -> float:
    source = torch.ones(COPIED // 4, device=place)
    target = torch.empty_like(source)
    return 2 * COPIED / _seconds(place, lambda: target.copy_(source))


def _upload(place: torch.device) -> float:
    """Bytes a second from pinned host memory, as weights come with offload."""
    source = torch.ones(COPIED // 4).pin_memory()
    target = torch.empty(COPIED // 4, device=place)
    return COPIED / _seconds(place, lambda: target.copy_(source, non_blocking=True))


def _products(place: torch.device, launch: float) -> tuple[float, float]:
    """Operations a second of large products, and the output elements' worth of time that each loses.

    Products take turns over more weights than caches hold, as a model's do: to read them anew is what a small patch
    loses most by on a CPU.
    """
    rows, width = (CPU_ROWS, CPU_WIDTH) if place.type == "cpu" else (CUDA_ROWS, CUDA_WIDTH)
    dtype = _dtype(place)
    count = WEIGHTS // (width**2 * dtype.itemsize)
    weights = torch.randn(count, width, width, device=place, dtype=dtype)
    given = [torch.randn(size, width, device=place, dtype=dtype) for size in rows]
    turn = iter(cycle(range(count)))
    inner = [max(1, min(count, CALLS * rows[0] // size)) for size in rows]
    seconds = [
        _seconds(place, lambda one=one: one @ weights[next(turn)], inner=times) - launch  # type: ignore[misc]
        for one, times in zip(given, inner, strict=True)
    ]
    return fit_products(rows, seconds, width)


def fit_products(rows: Sequence[int], seconds: Sequence[float], width: int) -> tuple[float, float]:
    """Rate and fill of ``seconds = 2·width·(rows·width + fill) / rate``: the line through the two largest sizes' slope.

    Args:
        rows: Rows of each product, ascending.
        seconds: What each took.
        width: Inputs and outputs.

    Returns:
        Operations a second, and output elements; the fill is the median over the smaller sizes of what they took
        beyond the rate.
    """
    slope = (seconds[-1] - seconds[-2]) / (rows[-1] - rows[-2])
    rate = 2 * width**2 / max(slope, 1e-3 * seconds[-1] / rows[-1])
    lost = [max(0.0, taken * rate / (2 * width) - count * width) for count, taken in zip(rows, seconds, strict=True)]
    return rate, median(lost[:-1])


def _attention_rate(place: torch.device) -> float:
    tokens, width = (1024, CPU_WIDTH) if place.type == "cpu" else (4096, CUDA_WIDTH)
    shape = 1, width // HEAD_CHANNELS, tokens, HEAD_CHANNELS
    query, key, value = (torch.randn(shape, device=place, dtype=_dtype(place)) for _ in range(3))
    seconds = _seconds(place, lambda: functional.scaled_dot_product_attention(query, key, value))
    return 4 * tokens**2 * width / seconds


def measure_link(places: Sequence[str], progress: Progress) -> Link:
    """Measures what joins ranks: NCCL between CUDA devices, gloo between processes on the CPU.

    Args:
        places: The device of each rank, two or more.
        progress: Told what is done.

    Raises:
        RuntimeError: A process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        context = processes.spawn(_rank, (list(places), store, folder), nprocs=len(places), join=False)
        progress("ranks")
        while not context.join(DEADLINE):
            pass
        found = [float(text) for text in (Path(folder) / "found").read_text(encoding="utf-8").split()]
    progress("link")
    cpu = places[0] == "cpu"
    return link_of(found, len(places), f"{'gloo' if cpu else 'NCCL'} on this machine", cpu)


def link_of(found: Sequence[float], ranks: int, name: str, cpu: bool) -> Link:
    """A link by what was measured.

    Args:
        found: Seconds of a small and of a large send to the next rank, of a large exchange of all with all, and of a
            large send to each further rank.
        ranks: Ranks that took part.
        name: Its name.
        cpu: Whether they are CPUs.
    """
    small, large, exchange, *farther = found
    latency = small
    bandwidth = MESSAGES[1] / max(large - small, 1e-9)
    island = island_of([large, *farther])
    trunk = bandwidth if island == ranks else MESSAGES[1] / max(farther[island - 2] - small, 1e-9)
    contention = 0.0
    if ranks > 2:
        shared = MESSAGES[1] / max(exchange - latency * (ranks - 1), 1e-9)
        contention = max(0.0, math.log(min(bandwidth, trunk) / shared) / math.log(ranks / 2))
    interference = CPU_INTERFERENCE if cpu else CUDA_INTERFERENCE
    source = "measured by patchpipe profile"
    return Link(name, bandwidth, latency, island, trunk, contention, interference, source)


def island_of(seconds: Sequence[float]) -> int:
    """How many ranks, the first one included, reach each other over fast links; all where links are alike.

    Args:
        seconds: What a large message takes from the first rank to the next, and to each further one.
    """
    ranks, least = len(seconds) + 1, min(seconds)
    far = [rank for rank, taken in enumerate(seconds, start=1) if taken > SLOWER * least]
    island = far[0] if far else ranks
    alike = island > 1 and ranks % island == 0 and far == list(range(island, ranks))
    return island if alike else ranks


def _rank(rank: int, places: list[str], store: str, folder: str) -> None:
    """One process: sends there and back between the first two, then an exchange of all."""
    place, ranks = torch.device(places[rank]), len(places)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    backend = "gloo" if place.type == "cpu" else "nccl"
    group = ProcessGroups(dist.FileStore(store, ranks), DEADLINE).make("profile", backend, rank, ranks)
    times = [_there_and_back(group, rank, place, size) for size in MESSAGES]
    wire = Wire(group, place, backend, DEADLINE, lambda error, _: error, "profile")
    times.append(_exchange(Exchange(wire, rank, ranks, tuple(range(ranks)))))
    times += [_there_and_back(group, rank, place, MESSAGES[1], other) for other in range(2, ranks)]
    group.barrier().wait()
    if rank == 0:
        (Path(folder) / "found").write_text(" ".join(str(seconds) for seconds in times), encoding="utf-8")


def _there_and_back(group: dist.ProcessGroup, rank: int, place: torch.device, size: int, other: int = 1) -> float:
    data = torch.zeros(size, dtype=torch.uint8, device=place)

    def once() -> None:
        if rank == 0:
            group.send([data], other, 0).wait()
            group.recv([data], other, 0).wait()
        elif rank == other:
            group.recv([data], 0, 0).wait()
            group.send([data], 0, 0).wait()

    return _seconds(place, once, repeats=9) / 2


def _exchange(line: Exchange) -> float:
    """Seconds of an exchange in which every rank sends ``MESSAGES[1]`` bytes to the others in all."""
    shape = (MESSAGES[1] // max(1, line.size - 1),)
    pieces = list(torch.zeros(line.size, *shape, dtype=torch.uint8, device=line.wire.device))
    return _seconds(line.wire.device, lambda: line.all_to_all(pieces, [shape] * line.size), repeats=5)
