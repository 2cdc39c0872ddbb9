"""Weights that come from a throttled host while blocks compute, beside what others do, and beside the model.

python -m bench.offload
python -m bench.offload --real --rounds 5
python -m bench.offload --patches
python -m bench.offload --draw

The device is played: a block sleeps for as long as it would compute, with exchanges in between, on a link on which
copies and exchanges share the bandwidth packet by packet. The rest is real: the engine's own thread, chunks, gate and
buffers. Time is that of a clock that jumps ahead when all threads wait (``tests/support/virtual_time.py``), so that a
busy machine does not show in it; with ``--real`` it is the machine's own.

*Group offload* is diffusers' own, block by block from disk, which is how it runs without CUDA, over the same link.
*Whole layers* are this engine with a block to a chunk, one ahead and no gate, as most programs do it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median
from time import perf_counter, sleep
from types import SimpleNamespace
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from patchpipe import OffloadConfig, ParallelConfig
from patchpipe.distributed.gate import Gate
from patchpipe.offload.choice import Link
from patchpipe.offload.copying import HostCopier, Throttle
from patchpipe.offload.model import Passing, waiting
from patchpipe.offload.mover import Mover
from patchpipe.offload.offload import Means, Offload
from tests.support.virtual_time import VirtualClock

Clock = Callable[[], Any]
COMMAND = "python -m bench.offload"
MEGABYTE = 10**6
PACKET = MEGABYTE // 8  # bytes that one side sends before the other may
MATRICES, MATRIX = 16, (512, 512)  # a block of 16.8 MB
COMPUTE, EXCHANGES, EXCHANGED = 0.06, 4, 2 * MEGABYTE  # seconds of a block; exchanges in it, and bytes of each
BANDWIDTHS, RESIDENT = (80, 160, 320), (0.0, 0.25, 0.5)  # megabytes a second; shares that stay
CHUNK = 0.5  # megabytes
CONTENTION = 1.0  # of a link that both share evenly: an exchange beside copies takes twice as long


class RealClock:
    """The machine's own."""

    now, sleep = staticmethod(perf_counter), staticmethod(sleep)

    @contextmanager
    def of(self, mover: Mover, gate: Gate) -> Iterator[None]:
        """Nothing need be changed."""
        yield


class SharedLink(Throttle):
    """A link that gives each of those that wait a packet in turn."""

    def __init__(self, bandwidth: float, clock: Any) -> None:
        super().__init__(bandwidth)
        self.clock = clock

    def take(self, size: int) -> None:
        """Returns when so many bytes are through."""
        for at in range(0, size, PACKET):
            with self._lock:
                self._free = max(self._free, self.clock.now()) + min(PACKET, size - at) / self.bandwidth
                until = self._free
            while (left := until - self.clock.now()) > 1e-9:
                self.clock.sleep(left)


class Device:
    """What blocks run on: time passes, and exchanges go over the link.

    Attributes:
        share: Of a block's seconds, that a pass takes; 1 / M for a patch of M.
        exchanges: Seconds of every exchange so far.
        events: What was done when, for the drawing: a kind, what of, start and end.
    """

    def __init__(self, link: SharedLink, gate: Gate) -> None:
        self.link, self.gate, self.share = link, gate, 1.0
        self.exchanges: list[float] = []
        self.events: list[tuple[str, str, float, float]] = []

    def compute(self, name: str) -> None:
        """One block; a patch of several goes through a stage, which has no exchanges."""
        clock = self.link.clock
        if self.share < 1:
            clock.sleep(COMPUTE * self.share)
            return
        for _ in range(EXCHANGES):
            began = clock.now()
            clock.sleep(COMPUTE / EXCHANGES)
            middle = clock.now()
            with self.gate.awaited():
                self.link.take(EXCHANGED)
            self.exchanges.append(clock.now() - middle)
            self.events += [("compute", name, began, middle), ("exchange", name, middle, clock.now())]


class Block(nn.Module):
    """A block whose weights count, and whose work is played."""

    def __init__(self, name: str, device: list[Device]) -> None:
        super().__init__()
        self.name, self.device = name, device
        self.matrices = nn.ParameterList(
            nn.Parameter(torch.randn(MATRIX), requires_grad=False) for _ in range(MATRICES)
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Waits; a number of the last matrix shows that the right weights were there."""
        self.device[0].compute(self.name)
        return rows + self.matrices[-1][0, 0]


class Model(nn.Module):
    """Blocks one after the other.

    Attributes:
        expected: What a pass makes of nothing.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.on: list[Device] = []
        self.blocks = nn.ModuleList(Block(f"blocks.{number}", self.on) for number in range(count))
        self.expected = sum(float(block.matrices[-1][0, 0]) for block in self.blocks)

    def forward(self, rows: Tensor) -> Tensor:
        """One pass."""
        for block in self.blocks:
            rows = block(rows)
        return rows


@dataclass(frozen=True)
class Row:
    """What one way of moving weights came to.

    Attributes:
        name: The way.
        bandwidth: Megabytes a second of the link.
        resident: Share of the weights that stays.
        seconds: Of a step.
        predicted: By the model; ``None`` where it does not apply.
        megabytes: That came in a step.
        stalled: Seconds of a step in which blocks waited.
        exchange: Milliseconds of an exchange.
        buffer: Megabytes of the working buffer.
    """

    name: str
    bandwidth: int
    resident: float
    seconds: float
    predicted: float | None
    megabytes: float
    stalled: float
    exchange: float
    buffer: float = 0.0


def measured(
    model: Model, device: Device, rounds: int, moved: Callable[[], tuple[int, float]] | None = None
) -> tuple[float, float, float, float]:
    """What a step comes to, after one to begin with.

    Returns:
        Seconds of it, megabytes that came, seconds stalled, and milliseconds of an exchange.
    """
    model.on[:] = [device]
    found = model(torch.zeros(1))
    device.exchanges.clear()
    before = (0, 0.0) if moved is None else moved()
    seconds = []
    clock = device.link.clock
    for _ in range(rounds):
        began = clock.now()
        model(torch.zeros(1))
        seconds.append(clock.now() - began)
    after = (0, 0.0) if moved is None else moved()
    assert moved is None or abs(float(found) - model.expected) < 1e-3, "a block computed with other weights"
    size, stalled = ((later - earlier) / rounds for earlier, later in zip(before, after, strict=True))
    return median(seconds), size / MEGABYTE, stalled, 1000 * sum(device.exchanges) / len(device.exchanges)


def with_all_on_the_device(model: Model, bandwidth: int, rounds: int, clock: Clock) -> Row:
    """Nothing comes."""
    device = Device(SharedLink(bandwidth * MEGABYTE, clock()), Gate(torch.device("cpu")))
    seconds, *_, exchange = measured(model, device, rounds)
    return Row("all stay", bandwidth, 1.0, seconds, sum(_seconds(model, bandwidth)), 0.0, 0.0, exchange)


@contextmanager
def offloaded(
    model: Model, bandwidth: int, asked: OffloadConfig, clock: Clock = VirtualClock
) -> Iterator[tuple[Offload, Device]]:
    """The model with this engine's hooks, on a link."""
    link, gate = SharedLink(bandwidth * MEGABYTE, clock()), Gate(torch.device("cpu"))
    device = Device(link, gate)
    group: Any = SimpleNamespace(device=torch.device("cpu"), rank=0, world_size=2, store=None, open_gate=lambda: gate)
    means = Means(Link(bandwidth * MEGABYTE, CONTENTION), None, lambda _: _seconds(model, bandwidth), {})
    offload = Offload(ParallelConfig(offload=asked), group, means)
    offload._copier = HostCopier(link)
    stage: Any = SimpleNamespace(
        model=model, blocks=[SimpleNamespace(block=each, name=each.name) for each in model.blocks]
    )
    undo = offload.attach(stage)
    try:
        with link.clock.of(offload.mover, gate):
            yield offload, device
    finally:
        undo()


def ours(name: str, model: Model, bandwidth: int, asked: OffloadConfig, rounds: int, clock: Clock) -> Row:
    """This engine."""
    with offloaded(model, bandwidth, asked, clock) as (offload, device):
        stats = lambda: (offload.stats.bytes, offload.stats.stalled_seconds)  # noqa: E731 - asked twice
        seconds, size, stalled, exchange = measured(model, device, rounds, stats)
        chosen = offload.chosen
        assert chosen is not None
        exchanges = [EXCHANGES * EXCHANGED / bandwidth / MEGABYTE] * len(model.blocks)
        passing = Passing(chosen.streamed, _seconds(model, bandwidth), exchanges, EXCHANGES)
        predicted = waiting(passing, chosen.transfers).seconds
        return Row(name, bandwidth, chosen.share, seconds, predicted, size, stalled, exchange, chosen.ring / MEGABYTE)


def group_offload(model: Model, bandwidth: int, rounds: int, clock: Clock) -> Row:
    """diffusers' own, over the same link."""
    from diffusers.hooks import apply_group_offloading  # heavy, as is what saves results
    from diffusers.hooks.group_offloading import ModuleGroup

    link, original = SharedLink(bandwidth * MEGABYTE, clock()), ModuleGroup.onload_
    device = Device(link, Gate(torch.device("cpu")))
    came = [0, 0.0]

    def throttled(group: Any) -> None:
        began = link.clock.now()
        original(group)
        size = sum(each.nbytes for module in group.modules for each in module.parameters())
        link.take(size)
        came[0], came[1] = came[0] + size, came[1] + link.clock.now() - began

    ModuleGroup.onload_ = throttled
    try:
        with tempfile.TemporaryDirectory() as folder:
            host = torch.device("cpu")
            apply_group_offloading(
                model, host, host, "block_level", num_blocks_per_group=1, offload_to_disk_path=folder
            )
            seconds, size, stalled, exchange = measured(model, device, rounds, lambda: (came[0], came[1]))
    finally:
        ModuleGroup.onload_ = original
    return Row("group offload", bandwidth, 0.0, seconds, None, size, stalled, exchange)


def _seconds(model: Model, bandwidth: int) -> list[float]:
    return [COMPUTE + EXCHANGES * EXCHANGED / bandwidth / MEGABYTE] * len(model.blocks)


def run(
    blocks: int, rounds: int, bandwidths: Sequence[int], shares: Sequence[float], clock: Clock = VirtualClock
) -> Iterator[Row]:
    """All ways, on all links."""
    whole = MATRICES * MATRIX[0] * MATRIX[1] * 4 / MEGABYTE
    for bandwidth in bandwidths:
        model = Model(blocks)
        yield with_all_on_the_device(model, bandwidth, rounds, clock)
        for share in shares:
            layers = OffloadConfig(resident=share, chunk=whole, depth=1, gate="off")
            yield ours("whole layers", model, bandwidth, layers, rounds, clock)
            for gate in ("off", "on"):
                asked = replace(OffloadConfig(resident=share, chunk=CHUNK), gate=gate)
                yield ours(f"chunks, gate {gate}", model, bandwidth, asked, rounds, clock)
        yield group_offload(Model(blocks), bandwidth, rounds, clock)


def by_patches(blocks: int, rounds: int) -> None:
    """A stage whose weights come once for every patch: bytes counted, and seconds beside the model's."""
    table = Table(
        title=f"A step of one stage at {BANDWIDTHS[1]} MB/s, whose blocks compute for {blocks * COMPUTE:.2f} s"
    )
    for name in ("patches", "stays", "MB", "counted", "s", "model", "off by"):
        table.add_column(name, justify="right")
    model, rate = Model(blocks), BANDWIDTHS[1] * MEGABYTE
    for patches in (2, 4, 8):
        for share in (0.0, 0.5, 0.75):
            with offloaded(model, BANDWIDTHS[1], OffloadConfig(resident=share, chunk=CHUNK, gate="off")) as (
                moving,
                device,
            ):
                model.on[:], device.share, clock = [device], 1 / patches, device.link.clock
                model(torch.zeros(1))
                copied, began = moving.stats.bytes, clock.now()
                for _ in range(patches * rounds):
                    model(torch.zeros(1))
                seconds, counted = (clock.now() - began) / rounds, (moving.stats.bytes - copied) / rounds
                chosen = moving.chosen
                assert chosen is not None
                passing = Passing(chosen.streamed, [COMPUTE / patches] * blocks)
                predicted = patches * waiting(passing, replace(chosen.transfers, bandwidth=rate)).seconds
                due = patches * sum(chosen.streamed)
            table.add_row(
                str(patches), f"{chosen.share:.0%}", f"{due / MEGABYTE:.1f}", f"{counted / MEGABYTE:.1f}",
                f"{seconds:.3f}", f"{predicted:.3f}", f"{seconds / predicted - 1:+.0%}",
            )  # fmt: skip
    Console(width=120).print(table)


def show(rows: Sequence[Row]) -> None:
    """A table for people."""
    table = Table(title="A step, by what moves the weights")
    for name in ("MB/s", "stays", "way", "s", "model", "off by", "MB", "stalled s", "exchange ms", "buffer MB"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        off = "" if row.predicted is None else f"{row.seconds / row.predicted - 1:+.0%}"
        predicted = "" if row.predicted is None else f"{row.predicted:.3f}"
        table.add_row(
            str(row.bandwidth), f"{row.resident:.0%}", row.name, f"{row.seconds:.3f}", predicted, off,
            f"{row.megabytes:.1f}", f"{row.stalled:.3f}", f"{row.exchange:.1f}", f"{row.buffer:.1f}",
        )  # fmt: skip
    Console(width=120).print(table)


def main(
    blocks: int = 6, rounds: int = 3, draw: bool = False, patches: bool = False, real: bool = False, keep: bool = True
) -> None:
    """Measures all ways, or a stage by its patches, or draws a pass without the gate and one with it."""
    torch.set_num_threads(1)
    if draw:
        from bench.offload_plot import OUT, timeline  # matplotlib, and needed here alone

        print(f"wrote {timeline(OUT)}")
        return
    if patches:
        by_patches(blocks, rounds)
        return
    rows = []
    for row in run(blocks, rounds, BANDWIDTHS, RESIDENT, RealClock if real else VirtualClock):
        print(f"{row.bandwidth} MB/s, {row.resident:.0%}: {row.name}, {row.seconds:.3f} s", flush=True)
        rows.append(row)
    show(rows)
    if keep and not real:
        from bench.rounds import save

        save("offload", COMMAND, {"blocks": blocks, "rounds": rounds, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    typer.run(main)
