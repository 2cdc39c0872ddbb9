"""Hops between stages: what arrives is what was sent, however calls follow one another."""

from __future__ import annotations

import time

import torch

from patchpipe import ParallelConfig
from patchpipe.distributed.mesh import Group
from patchpipe.models.latent import Raster
from patchpipe.schedule.hops import Crossing, Hops
from patchpipe.stage.patches import Cut, Patch
from tests.support.ranks import Place, run_ranks

CUT = Cut.of(Raster(count=5, tokens=2, units=1), ParallelConfig(patches=2))
WHOLE, PATCHES = [CUT.whole], list(CUT.patches)
Call = tuple[int, list[Patch], int]  # guidance branch, pieces, text rows


def stream(call: int, piece: Patch, text_rows: int) -> dict[str, torch.Tensor]:
    text = torch.full((1, text_rows if piece.carries_riders else 0, 3), 10.0 * call + 5)
    return {"text": text, "hidden_states": torch.full((1, piece.token_count, 3), 10.0 * call + piece.index)}


def crossing(group: Group, piece: Patch, text_rows: int, width: int = 3, batch: int = 1) -> Crossing:
    """What goes between two stages for a piece."""
    counts = {"text": text_rows if piece.carries_riders else 0, "hidden_states": piece.token_count}
    hop = {name: (torch.Size((batch, rows, width)), torch.float32) for name, rows in counts.items() if rows}
    return Crossing({} if group.first else hop, {} if group.last else hop, large=piece.whole)


def send_all(place: Place, calls: list[Call]) -> tuple[list[bool], int]:
    """Whether every stream arrived as it left, on the second stage; what was sent, on the first."""
    group, right = place.join(ParallelConfig(pipefusion=2, timeout=20)), []
    for _ in range(2):  # requests: the channels are as good as new after the first
        hops = Hops(group)
        for number, (branch, pieces, text_rows) in enumerate(calls):
            receives = hops.begin(branch, [crossing(group, piece, text_rows) for piece in pieces])
            for piece, posted in zip(pieces, receives, strict=True):
                expected = stream(number, piece, text_rows)
                if group.first:
                    hops.pass_on(expected, crossing(group, piece, text_rows))
                    continue
                names = [name for name, rows in expected.items() if rows.numel()]
                assert sorted(posted) == sorted(names)
                right += [torch.equal(posted[name].take(), expected[name]) for name in names]
        hops.end()
        group.drain()
    return right, group.traffic()[0]


def test_streams_arrive_in_order_whatever_the_next_call_is() -> None:
    alternating: list[Call] = [(branch, PATCHES, 2 + branch) for _ in range(3) for branch in (0, 1)]
    warm_up: list[Call] = [(0, WHOLE, 2), (1, WHOLE, 3)]
    surprising: list[Call] = [(0, PATCHES, 4), (0, WHOLE, 4), (0, PATCHES, 1), (1, PATCHES, 1), (1, PATCHES, 0)]
    calls = [*warm_up, *alternating, *surprising]
    (_, sent), (right, _) = run_ranks(2, send_all, calls)
    assert all(right)
    rows = sum(CUT.total_tokens + text_rows for _, _, text_rows in calls)
    assert sent == 2 * rows * 3 * 4, "what uses up a receive posted in vain does not count"


def send_early(place: Place) -> None:
    """The second stage is busy with one call while the next one's first patch is sent."""
    group = place.join(ParallelConfig(pipefusion=2, timeout=20))
    hops, crossings = Hops(group), [crossing(group, piece, 0, 512, 64) for piece in PATCHES]
    for call in range(4):
        receives = hops.begin(0, crossings)
        for piece, own, posted in zip(PATCHES, crossings, receives, strict=True):
            if group.first:
                hops.pass_on({"hidden_states": torch.full((64, piece.token_count, 512), float(call))}, own)
                continue
            if piece.index == 0 and call == 3:
                memory = posted["hidden_states"]._buffer
                assert memory is not None
                assert (memory == 3).all(), "it travelled before this call began, and nobody has waited for it"
            posted["hidden_states"].take()
            if piece.index == 1 and call == 2:
                time.sleep(1)
    hops.end()
    group.drain()


def test_the_next_calls_first_patch_travels_during_this_call() -> None:
    run_ranks(2, send_early)
