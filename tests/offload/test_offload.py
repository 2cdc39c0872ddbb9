"""Weights that come and go: which stay, where the others lie, when they come, and what a pass then takes."""

from __future__ import annotations

import random
import threading
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import offload as bench
from patchpipe import OffloadConfig, ParallelConfig
from patchpipe.cli.options import read_config
from patchpipe.distributed.gate import Gate
from patchpipe.offload import copying
from patchpipe.offload.choice import GIB, Inventory, Link, choose
from patchpipe.offload.copying import HostCopier, Throttle
from patchpipe.offload.model import Passing, Transfers, chunk_for, hidden, least_resident, quicker_gated, waiting
from patchpipe.offload.mover import Mover, Streamed
from patchpipe.offload.residency import chosen, spread
from patchpipe.offload.ring import aligned, place, ring_bytes
from patchpipe.planner import Profile, predict
from patchpipe.planner.report import layout_words, reasons
from patchpipe.planner.search import Wishes, search
from patchpipe.planner.work.presets import preset_named
from tests.support.virtual_time import VirtualClock

SECONDS = 60  # that a thread may take before a test gives up


# -- what is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory": 0}, "offload memory=0 must be a number of GiB above 0"),
        ({"memory": float("inf")}, "memory=inf must be"),
        ({"resident": 1.5}, "resident=1.5 must be a share between 0 and 1"),
        ({"resident": True}, "resident=True must be a share"),
        ({"chunk": -1}, "chunk=-1 must be a number of megabytes above 0"),
        ({"depth": 0}, "depth=0 must be a whole number of 1 or more"),
        ({"depth": 1.5}, "depth=1.5 must be a whole number"),
        ({"gate": True}, "gate=True is unknown: use 'auto', 'on' or 'off'"),
        ({"tier": "tape"}, "tier='tape' is unknown: use 'host' or 'disk'"),
        ({"throttle": 0}, "throttle=0 must be a number of gigabytes a second above 0"),
    ],
)
def test_bad_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OffloadConfig(**fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "much"}, "offload='much' must be an OffloadConfig, 'auto' or None"),
        ({"offload": {"memry": 1}}, "offload has no 'memry': use memory, resident"),
        ({"offload": "auto", "compile": True}, "compile=True is not tested with offload"),
        ({"offload": {"tier": "disk"}, "tensor": 2}, "tier='disk' reads whole matrices, but tensor=2 needs slices"),
    ],
)
def test_bad_layouts_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**options)


def test_what_is_asked_for_is_written_and_read() -> None:
    for asked in (OffloadConfig(), OffloadConfig(memory=8), OffloadConfig(resident=0.25, depth=3, gate="off")):
        assert OffloadConfig.read(asked.words) == asked
        config = ParallelConfig(pipefusion=2, offload=asked)
        assert ParallelConfig(**config.as_dict()) == config
        assert "offload" in config.describe()
    assert OffloadConfig.read("8") == OffloadConfig(memory=8)
    assert ParallelConfig(offload="auto") == ParallelConfig(offload=OffloadConfig())  # type: ignore[arg-type]
    assert read_config({"offload": "memory=8,tier=disk"}).offload == OffloadConfig(memory=8, tier="disk")
    for text, message in (("fast", "memory=fast must be a number"), ("gate=on,x", "'x' must look like name=value")):
        with pytest.raises(ValueError, match=message):
            OffloadConfig.read(text)


# -- where weights lie ---------------------------------------------------------------------------


def test_tensors_lie_in_one_piece_and_blocks_fit_the_ring() -> None:
    draw = random.Random(0)
    for _ in range(50):
        blocks = [[aligned(draw.randint(1, 9000)) for _ in range(draw.randint(1, 6))] for _ in range(5)]
        ring = ring_bytes(max(map(sum, blocks)), max(map(max, blocks)), draw.randint(1, 3), 1000)
        position = 0
        for sizes in blocks * 3:
            found = place(sizes, position, ring)
            assert found.stop - found.start <= ring
            for start, size in zip(found.starts, sizes, strict=True):
                assert start >= position
                assert start % ring + size <= ring
            chunks = [chunk for run in found.runs for chunk in run.chunks(1000)]
            assert sum(chunk.size for chunk in chunks) == sum(sizes)
            assert [chunk.source for chunk in chunks] == sorted(chunk.source for chunk in chunks)
            assert all(chunk.size <= 1000 and chunk.start % ring + chunk.size <= ring for chunk in chunks)
            position = found.stop
    exact = place([512, 1024, 512], 1536, 2048)  # a tensor ends where the buffer does
    assert [(run.source, run.start, run.size) for run in exact.runs] == [(0, 1536, 512), (512, 2048, 1536)]


# -- what stays ----------------------------------------------------------------------------------


def test_every_block_waits_for_as_long_as_any_other() -> None:
    sizes, seconds, bandwidth = [100.0, 40.0, 100.0, 100.0], [2.0, 1.0, 4.0, 1.0], 10.0
    stays = spread(sizes, seconds, bandwidth, 150.0)
    assert sum(stays) == pytest.approx(150)
    before = [seconds[block - 1] for block in range(4)]
    waits = [(size - stay) / bandwidth - each for size, stay, each in zip(sizes, stays, before, strict=True)]
    moving = [wait for wait, size, stay in zip(waits, sizes, stays, strict=True) if 0 < stay < size]
    assert max(moving) == pytest.approx(min(moving))
    assert waits[1] <= max(moving)  # a block that comes whole, and waits for less


def test_no_more_stays_than_is_wanted_and_what_one_lacks_the_next_gets() -> None:
    weights = [[60, 30, 10]] * 4
    kept = chosen(weights, [50.0] * 4)
    total = [sum(weights[0][number] for number in numbers) for numbers in kept]
    assert sum(total) <= 200
    assert sum(total) >= 190
    assert chosen(weights, [100.0] * 4) == [[0, 1, 2]] * 4


# -- how long it takes ---------------------------------------------------------------------------


def test_weights_are_hidden_where_a_block_computes_long_enough() -> None:
    transfers = Transfers(bandwidth=100.0, chunk=10, depth=100, starting=0.0)
    for seconds in (0.5, 1.0, 2.0):
        found = waiting(Passing([100] * 6, [seconds] * 6), transfers)
        assert found.stalled == pytest.approx(6 * max(0.0, 1.0 - seconds))
        assert hidden(100, seconds, 100.0) == (found.stalled == 0)
    share = least_resident(100, 0.4, 100.0)
    assert share == pytest.approx(0.6)
    assert hidden((1 - share) * 100, 0.4, 100.0)


def test_little_depth_leaves_little_to_come_ahead() -> None:
    short = waiting(Passing([100] * 6, [2.0] * 6), Transfers(100.0, 10, 4, starting=0.0))
    assert short.stalled == pytest.approx(6 * 0.6)  # 40 of 100 bytes come while the block before computes
    uneven = Passing([150, 50] * 3, [1.0] * 6)
    assert waiting(uneven, Transfers(100.0, 10, 10, starting=0.0)).stalled == pytest.approx(3 * 0.5)
    assert waiting(uneven, Transfers(100.0, 10, 15, starting=0.0)).stalled == pytest.approx(0.0)


@pytest.mark.parametrize(("frames", "comes"), [(29, False), (33, False), (37, True), (81, True)])
def test_the_critical_number_of_frames_of_wan_is_chunkflows(frames: int, comes: bool) -> None:
    tokens = 225 * (frames + 3)  # Wan 2.2 5B at 704×1280 on two H100 over PCIe, as its authors reckon
    operations = 24_576 * tokens**2 + 239_075_328 * tokens + 1.93e10
    assert hidden(327_155_712, operations / 756e12, 63e9) is comes


def test_the_gate_pays_where_exchanges_are_long_and_copies_have_time() -> None:
    link = Transfers(bandwidth=100.0, chunk=1, depth=200, contention=0.5, starting=0.0)
    assert quicker_gated(Passing([50] * 4, [2.0] * 4, [1.0] * 4), link)  # hidden all the same, and no exchange slowed
    assert not quicker_gated(Passing([300] * 4, [2.0] * 4, [1.0] * 4), link)  # every second of copying is exposed
    assert not quicker_gated(Passing([50] * 4, [2.0] * 4, [1.0] * 4), Transfers(100.0, 1, 200, contention=0.0))


def test_a_chunk_costs_little_to_start() -> None:
    assert 10e6 < chunk_for(24e9, 400_000_000) < 20e6
    assert chunk_for(48e9, 400_000_000) > chunk_for(24e9, 400_000_000)
    assert chunk_for(24e9, 1000) <= 250


def test_more_memory_is_never_slower_and_none_is_exceeded() -> None:
    inventory = Inventory(((40 << 20, 20 << 20, 4 << 20),) * 12, (0.002,) * 12)
    link, seconds = Link(24e9, 0.43), []
    for memory in (0.15, 0.2, 0.3, 0.5, 0.7, 0.8):
        found = choose(OffloadConfig(memory=memory), inventory, link)
        assert found.bytes <= memory * GIB
        assert found.ring == (0 if memory == 0.8 else ring_of(inventory, found))
        seconds.append(found.waiting.seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert found.share == 1
    assert found.waiting.stalled == 0
    with pytest.raises(ValueError, match=r"need at least 0\.\d+ GiB on the device .* but there is only 0.01 GiB"):
        choose(OffloadConfig(memory=0.011), inventory, link)


def ring_of(inventory: Inventory, found: Any) -> int:
    coming = [
        size
        for sizes, kept in zip(inventory.weights, found.resident, strict=True)
        for number, size in enumerate(sizes)
        if number not in kept
    ]
    return ring_bytes(max(found.streamed), max(coming), found.transfers.depth, found.transfers.chunk)


# -- the mover -----------------------------------------------------------------------------------


class Bytes:
    """A home of one value."""

    def __init__(self, size: int, value: int) -> None:
        self.memory = torch.full((size,), value, dtype=torch.uint8)
        self.asked: list[int] = []

    def piece(self, start: int, size: int) -> Tensor:
        return self.memory[start : start + size]

    def ahead(self, start: int, size: int) -> None:
        self.asked.append(start)

    def close(self) -> None: ...


class Slow(HostCopier):
    """Copies when it is told to, and keeps a record."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed, self.began = threading.Semaphore(0), threading.Semaphore(0)
        self.copied: list[int] = []

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.began.release()
        assert self.allowed.acquire(timeout=SECONDS)
        super().copy(target, source)
        self.copied.append(int(source[0]))


SIZE = 4 * 512


def mover_of(blocks: int, copier: HostCopier, gate: Gate | None = None, *, depth: int = 4) -> Mover:
    ring = torch.zeros(ring_bytes(SIZE, SIZE, depth, 512), dtype=torch.uint8)
    mover = Mover(ring, copier, Transfers(1e9, 512, depth), gate, SECONDS)
    mover.add({n: Streamed(Bytes(SIZE, n + 1), (SIZE,), (n + 1) % blocks) for n in range(blocks)})  # type: ignore[arg-type]
    return mover


def lies(mover: Mover, key: int) -> None:
    """Calls for a block, looks at its bytes and overwrites them, as one that is done with."""
    placement = mover.need(key)
    at = placement.starts[0] % mover._ring.numel()
    found = mover._ring[at : at + SIZE]
    assert set(found.tolist()) == {key + 1}
    found.fill_(255)
    mover.done()


def test_blocks_find_their_bytes_round_after_round_and_nothing_grows() -> None:
    mover = mover_of(5, HostCopier())
    for turn in range(12):
        for key in range(5):
            lies(mover, key)
        assert len(mover._entries) <= 5, turn
    stats = mover.stats
    assert stats.blocks == 60
    assert stats.out_of_turn == 0
    assert 60 * SIZE <= stats.bytes <= 60 * SIZE + 4 * 512  # and what came ahead of a block that was not called
    assert stats.peak <= mover._ring.numel()
    mover.close()


def test_blocks_out_of_turn_are_right_too() -> None:
    mover, draw = mover_of(6, HostCopier()), random.Random(1)
    order = [draw.randrange(6) for _ in range(60)] + [0, 1, 2, 3, 4, 5, 0, 1, 3, 4, 5]
    for key in order:
        lies(mover, key)
    assert mover.stats.out_of_turn > 0
    mover.close()


def test_no_more_comes_ahead_than_the_depth() -> None:
    copier = Slow()
    mover = mover_of(3, copier, depth=2)
    thread = threading.Thread(target=mover.need, args=(0,))
    thread.start()
    for _ in range(6):  # four chunks of the block that was called, and two ahead
        assert copier.began.acquire(timeout=SECONDS)
        copier.allowed.release()
    thread.join(SECONDS)
    assert not copier.began.acquire(timeout=0.2)
    mover.done()
    assert not copier.began.acquire(timeout=0.2)  # it has left, but the next has not been called
    copier.allowed.release(100)
    mover.need(1)
    assert copier.copied[:8] == [1, 1, 1, 1, 2, 2, 2, 2]
    mover.close()


class Late(HostCopier):
    """A device that is behind its host: what was computed has ended when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[threading.Event] = []
        self.copies = threading.Semaphore(0)

    def copy(self, target: Tensor, source: Tensor) -> None:
        super().copy(target, source)
        self.copies.release()

    def leave(self) -> Any:
        self.ends.append(threading.Event())
        return self.ends[-1]

    def finish(self, mark: Any) -> None:
        assert mark is None or mark.wait(SECONDS)


def test_what_a_late_device_still_reads_is_not_written_over() -> None:
    copier = Late()
    mover = mover_of(3, copier, depth=2)  # two blocks fit, and two chunks of a third but not in one piece
    first = mover.need(0)
    mover.done()
    mover.need(1)
    for _ in range(8):
        assert copier.copies.acquire(timeout=SECONDS)
    assert not copier.copies.acquire(timeout=0.2)
    assert set(mover._ring[first.start : first.start + SIZE].tolist()) == {1}
    copier.ends[0].set()
    assert copier.copies.acquire(timeout=SECONDS)
    assert copier.copies.acquire(timeout=SECONDS)
    assert set(mover._ring[: 2 * 512].tolist()) == {3}
    mover.done()
    copier.ends[1].set()
    mover.close()


def test_a_closed_gate_holds_the_next_chunk_until_it_opens() -> None:
    copier, gate = Slow(), Gate(torch.device("cpu"), patience=SECONDS)
    mover = mover_of(2, copier, gate)
    thread = threading.Thread(target=mover.need, args=(0,))
    thread.start()
    assert copier.began.acquire(timeout=SECONDS)
    with gate.awaited():
        assert gate.closed
        copier.allowed.release(100)  # the chunk under way goes on, the next one waits
        assert not copier.began.acquire(timeout=0.1)
    assert copier.began.acquire(timeout=SECONDS)
    thread.join(SECONDS)
    assert mover.stats.gated >= 1
    assert mover.stats.gated_seconds > 0
    mover.close()


class Work:
    def __init__(self) -> None:
        self.over = False

    def is_completed(self) -> bool:
        return self.over


def test_the_gate_opens_when_the_device_has_done_it_and_not_before() -> None:
    gate, work, other = Gate(torch.device("cpu"), patience=0.01), Work(), Work()
    gate.began(work)
    gate.began(other)
    assert gate.closed
    assert gate.wait() >= 0.01  # a late rank does not hold weights up for ever
    work.over = True
    assert gate.closed
    other.over = True
    assert not gate.closed
    assert gate.wait() < SECONDS


def test_a_home_that_fails_is_told_where_it_is_needed() -> None:
    mover = mover_of(2, HostCopier())

    def broken(start: int, size: int) -> Tensor:
        raise OSError("the disk is gone")

    mover._blocks[1].home.piece = broken  # type: ignore[method-assign]
    mover.need(0)
    mover.done()
    with pytest.raises(RuntimeError, match="the weights of 1 could not be read: the disk is gone"):
        mover.need(1)
    mover.close()


def test_a_thread_that_does_not_know_what_comes_next_says_so_at_once() -> None:
    ring = torch.zeros(ring_bytes(SIZE, SIZE, 4, 512), dtype=torch.uint8)
    mover = Mover(ring, HostCopier(), Transfers(1e9, 512, 4), None, SECONDS)
    mover.add({key: Streamed(Bytes(SIZE, key + 1), (SIZE,), "nowhere") for key in (0, 1)})  # type: ignore[arg-type]
    mover.need(0)
    mover._thread.join(SECONDS)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="weights of 1 could not be read: 'nowhere'"):
        mover.need(1)


def test_a_block_does_not_wait_for_ever() -> None:
    mover = mover_of(2, Slow())
    mover._timeout = 0.1
    with pytest.raises(RuntimeError, match=r"the weights of 0 did not come from the host within 0\.1 s"):
        mover.need(0)
    mover._copier.allowed.release(100)  # type: ignore[attr-defined]
    mover.close()


def test_a_throttled_link_is_shared() -> None:
    link, began = Throttle(1e6), perf_counter()
    threads = [threading.Thread(target=link.take, args=(30_000,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert perf_counter() - began >= 0.09


def test_reading_is_part_of_a_chunks_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(copying, "perf_counter", lambda: now[0])
    monkeypatch.setattr(copying, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    link = Throttle(1e6)
    link.take(30_000)
    assert now == [pytest.approx(0.03)]
    for reading, until in ((0.02, 0.06), (0.05, 0.11), (0.0, 0.14)):  # the link is faster, slower, or alone
        now[0] += reading
        link.read(reading)
        link.take(30_000)
        assert now == [pytest.approx(until)]


# -- the planner ---------------------------------------------------------------------------------

CARD = Profile.named("rtx4090", "pcie4")
FLUX = preset_named("flux.1-dev").workload(1024, 1024)  # type: ignore[union-attr]


def test_layouts_that_did_not_fit_appear_with_their_seconds() -> None:
    memory = 16 * GIB
    with pytest.raises(ValueError, match="does not fit 1 devices of 16"):
        search(FLUX, 1, CARD, Wishes(memory=memory))
    best = search(FLUX, 1, CARD, Wishes(memory=memory, offload=True)).best
    assert best.config.offload is not None
    assert best.bytes <= memory
    assert best.uploads[0] > 0
    assert best.seconds >= predict(FLUX, ParallelConfig(), CARD).seconds
    assert "offload" in best.config.describe()
    assert ParallelConfig(**best.config.as_dict()) == best.config
    words = layout_words(best.config)
    assert OffloadConfig.read(words[words.index("--offload") + 1]) == best.config.offload


def test_a_host_has_the_weights_of_a_stage_once_however_many_ranks_share_it() -> None:
    def hosted(**layout: Any) -> tuple[int, ...]:
        return predict(FLUX, ParallelConfig(**layout, offload=OffloadConfig(resident=0.5)), CARD).hosted

    [alone] = hosted()
    assert alone == pytest.approx(0.5 * sum(block.parameters for block in FLUX.blocks) * FLUX.itemsize, rel=0.05)
    assert hosted(ulysses=4) == (alone,)
    assert sum(hosted(pipefusion=2, ulysses=2)) == pytest.approx(alone, rel=0.05)
    assert alone / 2 < hosted(tensor=2)[0] < 0.7 * alone  # slices differ, and some matrices are whole
    on_disk = ParallelConfig(offload=OffloadConfig(resident=0.5, tier="disk"))
    assert predict(FLUX, on_disk, CARD).hosted == ()
    choice = search(FLUX, 2, CARD, Wishes(memory=12 * GIB, offload=True))
    held = sum(choice.best.hosted) * choice.best.config.tensor / 1e9
    assert any(f"has {held:.1f} GB of them in its memory" in line for line in reasons(choice, 0.0))
    assert choice.best.as_dict()["host_bytes"] == list(choice.best.hosted)


def test_a_card_too_small_for_offload_says_what_it_would_take() -> None:
    with pytest.raises(ValueError, match=r"the least any layout needs is \d\.\d GiB \(one device · offload to"):
        search(FLUX, 1, CARD, Wishes(memory=4 * GIB, offload=True))


def test_what_fits_is_left_alone() -> None:
    with_it, without = (search(FLUX, 2, CARD, Wishes(offload=offload)) for offload in (True, False))
    assert [one.config for one in with_it.ranked if one.config.offload is None] == [
        one.config for one in without.ranked
    ]
    assert with_it.best.config == without.best.config


def test_less_memory_takes_longer_and_more_passes_bring_more() -> None:
    def asked(memory: float, **layout: Any) -> Any:
        return predict(FLUX, ParallelConfig(**layout, offload=OffloadConfig(memory=memory)), CARD)

    seconds = [asked(memory).seconds for memory in (23, 12, 6, 2)]
    assert seconds == sorted(seconds)
    few, many = (asked(4, pipefusion=2, patches=patches) for patches in (2, 8))
    assert many.uploads[0] > 3 * few.uploads[0]
    assert many.seconds > few.seconds
    with pytest.raises(ValueError, match=r"need at least 0\..* GiB on the device"):
        asked(0.01)


# -- the engine beside the model, in the time of a clock that waits for all threads ----------------


@pytest.mark.parametrize("gate", ["off", "on"])
def test_the_engine_takes_as_long_as_the_model_says(gate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PACKET", 250_000)
    model = bench.Model(4)
    for bandwidth, share in ((80, 0.25), (160, 0.0), (320, 0.5)):
        asked = OffloadConfig(resident=share, chunk=0.5, gate=gate)
        row = bench.ours("ours", model, bandwidth, asked, 1, VirtualClock)
        assert row.seconds == pytest.approx(row.predicted, rel=0.1)
