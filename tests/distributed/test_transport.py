"""Tensors between ranks: in order, counted, and waited for once."""

from __future__ import annotations

import os
import socket
import struct
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch

from patchpipe import ParallelConfig, RankLost
from patchpipe.distributed.transport import CALLS_IN_FLIGHT
from patchpipe.parallel.tensor import all_reduce
from tests.support.ranks import Place, run_ranks

SHAPE = (3, 5)
MANY, PER_CALL = 100, 7


def tensor(index: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(SHAPE, float(index), dtype=dtype)


def exchange(place: Place) -> tuple[list[float], int, float, int]:
    group = place.join(ParallelConfig(pipefusion=2, timeout=20.0))
    if place.rank == 0:
        channel = group.channel_to_next()
        for index in range(MANY):
            sent = tensor(index)
            if index % PER_CALL == 0:
                channel.next_call()
            channel.send(sent)
        channel.send(torch.arange(15.0).reshape(5, 3).T)  # what is not contiguous arrives as it looks
        channel.send(tensor(7, torch.bfloat16))
        pending = len(channel._sends)
        channel.drain()
        return [], channel.sent_bytes, channel.waited_seconds, pending
    channel = group.channel_from_previous()
    receives = [channel.expect(SHAPE, torch.float32) for _ in range(MANY)]
    turned, half = channel.expect((3, 5), torch.float32), channel.expect(SHAPE, torch.bfloat16)
    values = [receive.take().unique().item() for receive in receives]
    assert torch.equal(turned.take(), torch.arange(15.0).reshape(5, 3).T)
    assert torch.equal(half.take(), tensor(7, torch.bfloat16))
    assert receives[0].done
    with pytest.raises(RuntimeError, match="taken twice"):
        receives[0].take()
    receives[0].wait()  # a second wait returns at once
    channel.drain()
    return values, channel.sent_bytes, channel.waited_seconds, len(channel._receives)


def test_tensors_arrive_in_order_and_bytes_are_counted() -> None:
    (_, sent, _, pending), (values, sent_back, waited, left) = run_ranks(2, exchange, timeout=60)
    assert values == list(range(MANY))
    assert sent == (MANY + 1) * 15 * 4 + 15 * 2
    assert sent_back == 0
    assert waited > 0
    assert pending <= PER_CALL * (CALLS_IN_FLIGHT + 1) + 2, "what was sent long ago is let go"
    assert left == 0


def untaken(place: Place) -> list[float]:
    """A request that leaves a receive behind must not shift those of the next one."""
    group = place.join(ParallelConfig(pipefusion=2, timeout=20.0))
    if place.rank == 0:
        channel = group.channel_to_next()
        for index in range(3):
            channel.send(tensor(index))
        channel.drain()
        channel.send(tensor(9))
        channel.drain()
        return []
    channel = group.channel_from_previous()
    receives = [channel.expect(SHAPE, torch.float32) for _ in range(3)]
    taken = [receives[0].take()[0, 0].item()]
    channel.drain()
    return [*taken, channel.expect(SHAPE, torch.float32).take()[0, 0].item()]


def test_draining_leaves_a_clean_channel() -> None:
    assert run_ranks(2, untaken, timeout=60)[1] == [0, 9]


def silence(place: Place) -> Any:
    group = place.join(ParallelConfig(pipefusion=2, timeout=1.0))
    if place.rank == 0:
        place.store.wait(["patience is over"], timedelta(seconds=30))
        return None
    with pytest.raises(RankLost) as caught:
        group.channel_from_previous().expect(SHAPE, torch.float32).take()
    place.store.set("patience is over", "yes")
    return str(caught.value)


def test_a_wait_ends_at_its_deadline() -> None:
    assert "rank 0 did not answer within 1 s" in run_ranks(2, silence, timeout=60)[1]


ELEMENTS = 1 << 18
SENT_AND_RESENT = 200  # where Linux's tcp_info holds the two, as 64 bits each


def socket_bytes() -> int:
    """What has left this process through all its TCP connections, by the kernel's count."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            sent, resent = struct.unpack_from("QQ", info, SENT_AND_RESENT)
            total += sent - resent
        except (OSError, struct.error):  # closed meanwhile, or not a TCP connection
            continue
    return total


def counted_and_left(place: Place) -> dict[str, tuple[int, int]]:
    """For each way to send: the bytes counted, and those the kernel saw leave."""
    group = place.join(ParallelConfig(ring=place.world_size, timeout=20.0))
    line, size, own = group.lines["ring"], place.world_size, torch.ones(ELEMENTS)
    to, source = group.answers((place.rank + 1) % size), group.answers((place.rank - 1) % size)

    def send() -> None:
        receive = source.expect((ELEMENTS,), torch.float32)
        to.send(own)
        receive.take()

    ways = {
        "send": send,
        "spread": lambda: line.spread(own, [(ELEMENTS,)] * size).take(),
        "all-to-all": lambda: line.all_to_all([own] * size, [(ELEMENTS,)] * size),
        "pass on": lambda: line.pass_on(own, (ELEMENTS,)).take(),
        "all-reduce": lambda: all_reduce(line, own.clone()),
    }
    found = {}
    for name, way in ways.items():
        group.share(0, dict)
        before = group.traffic()[0], socket_bytes()
        way()
        group.drain()
        group.share(place.world_size - 1, dict)
        found[name] = group.traffic()[0] - before[0], socket_bytes() - before[1]
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how many bytes have left")
def test_what_is_counted_is_what_leaves() -> None:
    """Whatever gloo does inside, an all-reduce above all; its headers are small beside a tensor of a mebibyte."""
    tensor = ELEMENTS * 4
    expected = {"send": 1, "spread": 2, "all-to-all": 2, "pass on": 1, "all-reduce": 2 * 2 / 3}  # of three ranks
    ranks = run_ranks(3, counted_and_left, timeout=60)
    for name, times in expected.items():
        counted = [rank[name][0] for rank in ranks]
        assert counted == pytest.approx([times * tensor] * 3, abs=4), name
        assert [rank[name][1] for rank in ranks] == pytest.approx(counted, rel=0.01), name
