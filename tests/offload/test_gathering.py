"""Ranks that copy a part of each chunk each paint what they paint alone, and never take one chunk for another."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch

from patchpipe import OffloadConfig, ParallelConfig, parallelize
from patchpipe.offload.copying import HostCopier
from patchpipe.offload.gathering import Gathering
from patchpipe.offload.model import Transfers
from patchpipe.offload.mover import Mover, Streamed
from patchpipe.offload.ring import ring_bytes
from patchpipe.planner.machine.devices import GB
from patchpipe.planner.machine.profiles import Profile
from patchpipe.planner.offloading import upload_link
from tests import tiny
from tests.offload.test_offload import SIZE, Bytes, lies
from tests.offload.test_offload_parity import beside, poisoned
from tests.support.nccl_rules import under_nccl_rules
from tests.support.parity import call_pipeline
from tests.support.ranks import Place
from tests.support.threads import run_threads

__all__ = ["poisoned"]  # what a block leaves behind is NaN here too
ALONE = OffloadConfig(resident=0.4, chunk=0.004, depth=3, gate="on")
TOGETHER = OffloadConfig(resident=0.4, chunk=0.004, depth=3, gate="on", gathered=True)
LAYOUTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("flux", {"ulysses": 2}),
    ("flux", {"pipefusion": 2, "ulysses": 2}),
    ("flux", {"ring": 2}),
    ("sd3", {"cfg": 2, "ulysses": 2}),
    ("wan-a14b", {"ulysses": 2, "patch_rows": (3, 2)}),
    ("qwen", {"ulysses": 2, "ring": 2, "patch_rows": (7,)}),
)


@pytest.mark.some(of=5)
@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=lambda value: value if isinstance(value, str) else str(value))
def test_ranks_that_copy_together_paint_the_same(name: str, layout: dict[str, Any]) -> None:
    alone, together = beside(name, layout, ALONE), beside(name, layout, TOGETHER)
    for one, other in zip(alone, together, strict=True):
        assert one["gathered"] == 0
        assert other["bytes"] == other["gathered"] > 0, "a half each"
        streamed, ahead = other["streamed_bytes_per_pass"], other["depth"] * other["chunk_bytes"]
        assert abs(other["bytes"] + other["gathered"] - one["bytes"]) <= ahead < streamed


def test_four_ranks_on_two_levels_gather_over_the_fast_links() -> None:
    for one in beside("flux", {"ulysses": 4, "ulysses_inner": 2, "patch_rows": (7,)}, TOGETHER):
        assert one["bytes"] == one["gathered"] > 0, "of two, not of four"


def test_over_nccls_rules_too() -> None:
    with under_nccl_rules() as seen:
        for one in beside("flux", {"ulysses": 2, "backend": "nccl"}, TOGETHER):
            assert one["bytes"] == one["gathered"] > 0
    assert not seen.late


# -- the mover -----------------------------------------------------------------------------------


def gathering_of(place: Place) -> Gathering:
    return Gathering.over(place.join(ParallelConfig(ulysses=place.world_size, timeout=5)))


def mover_of(place: Place, blocks: int, depth: int = 3) -> Mover:
    gathering = gathering_of(place)
    ring = torch.zeros(ring_bytes(SIZE, SIZE, depth, 500), dtype=torch.uint8)
    mover = Mover(ring, HostCopier(None, gathering), Transfers(1e9, 500, depth), None, 5, together=True)
    mover.add({n: Streamed(Bytes(SIZE, n + 1), (SIZE,), (n + 1) % blocks) for n in range(blocks)})  # type: ignore[arg-type]
    return mover


@pytest.mark.parametrize("ranks", [2, 3])
def test_blocks_out_of_turn_are_right_on_ranks_of_different_pace(ranks: int) -> None:
    def walk(place: Place) -> int:
        mover, draw, pace = mover_of(place, 6), random.Random(1), random.Random(place.rank)
        for key in [0, 1, 2, *(draw.randrange(6) for _ in range(40)), 3, 4, 5, 0]:
            time.sleep(pace.random() * 0.004)
            lies(mover, key)
        mover.close()
        assert mover.stats.out_of_turn > 10
        return mover.stats.chunks

    assert len(set(run_threads(ranks, walk))) == 1, "the same chunks"


def test_a_rank_that_does_not_come_is_told_in_time() -> None:
    def walk(place: Place) -> None:
        mover = mover_of(place, 3)
        if place.rank == 0:
            with pytest.raises(RuntimeError, match=r"the weights of 0 (could not be read: .*rank 1|did not come)"):
                mover.need(0)
        mover.close()

    began = time.perf_counter()
    run_threads(2, walk)
    assert time.perf_counter() - began < 20


def test_ranks_that_ran_other_blocks_are_told_and_paint_nothing() -> None:
    def walk(place: Place) -> None:
        pipe = tiny.pipeline("flux")
        config = ParallelConfig(ulysses=2, warmup="all", timeout=10, offload=TOGETHER)
        parallelize(pipe, config, group=place.join(config))
        call_pipeline(pipe, tiny.call_arguments("flux", steps=1))
        pipe.patchpipe.offload.mover.order += place.rank
        call_pipeline(pipe, tiny.call_arguments("flux", steps=1))

    with pytest.raises(AssertionError, match="ranks 0, 1 copy weights together and differ in the blocks that they ran"):
        run_threads(2, walk)


def test_what_is_compared_is_not_kept() -> None:
    def compare(place: Place) -> int:
        gathering = gathering_of(place)
        before = gathering._group.store.num_keys()  # type: ignore[union-attr]
        for turn in range(20):
            gathering.compare("turns", turn)
        return gathering._group.store.num_keys() - before  # type: ignore[union-attr]

    assert all(kept <= 4 for kept in run_threads(2, compare))


# -- the model and what is refused ---------------------------------------------------------------


def test_the_link_is_that_of_all_ranks_and_what_they_give_each_other() -> None:
    profile = Profile.named("h100", "nvlink4")
    alone = upload_link(profile, ParallelConfig(ulysses=8, offload=OffloadConfig())).bandwidth
    together = upload_link(profile, ParallelConfig(ulysses=8, offload=OffloadConfig(gathered=True))).bandwidth
    assert together == pytest.approx(1 / (1 / (8 * alone) + 7 / 8 / profile.link.bandwidth))
    assert together > 4 * alone
    slow = OffloadConfig(gathered=True, throttle=1.0)
    assert upload_link(profile, ParallelConfig(ring=2, offload=slow)).bandwidth == pytest.approx(2 * GB, rel=0.02)


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="gathered=True is for ranks that share a stage: use ulysses or ring"):
        ParallelConfig(pipefusion=2, offload=TOGETHER)
    with pytest.raises(ValueError, match="gathered='yes' must be True or False"):
        OffloadConfig(gathered="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--offload gathered=yes must be on or off"):
        OffloadConfig.read("gathered=yes")
    assert OffloadConfig.read(TOGETHER.words) == TOGETHER
    assert OffloadConfig.read("memory=2,gathered=off").words == "memory=2"
