"""Ranks of one host that hold the same weights have them once in host memory, and none sees what another writes."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchpipe
from patchpipe import OffloadConfig, ParallelConfig
from patchpipe.errors import RankFailed, RankLost
from patchpipe.layout.axes import Mesh
from patchpipe.offload.shared import file, home, sharing
from patchpipe.offload.shared.file import MemoryFile, Place
from patchpipe.offload.weights import weights_of
from patchpipe.pipeline.pretrained import from_pretrained
from tests import tiny
from tests.support.parity import call_pipeline
from tests.support.ranks import Place as Rank
from tests.support.ranks import run_ranks
from tests.support.threads import run_threads
from tests.tiny import loras

ALL = OffloadConfig(resident=0.0, chunk=0.01)
TWO = ParallelConfig(ulysses=2, warmup="all", offload=ALL, timeout=60)
MEGABYTE = 10**6


def attached(rank: Rank, config: ParallelConfig = TWO, name: str = "flux") -> Any:
    return patchpipe.parallelize(tiny.pipeline(name), config, group=rank.join(config))


def host_of(pipe: Any) -> tuple[int, int, list[int]]:
    told = pipe.patchpipe.offload.as_dict()
    return told["host_bytes"], told["host_shared_bytes"], told["host_ranks"]


def blocks_of(pipe: Any) -> list[nn.Module]:
    return [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]


# -- memory that several processes map -----------------------------------------------------------


def test_what_is_written_in_a_private_mapping_nobody_else_sees() -> None:
    with MemoryFile(10_000) as made:
        common, one, other = (made.place.mapped(private=private) for private in (False, True, True))
    common.fill_(7)
    one[:100] = 1
    assert set(common.tolist()) == set(other.tolist()) == {7}
    assert set(one.tolist()) == {1, 7}
    with pytest.raises(OSError, match="No such file"):  # it is shut; those that map it keep it
        made.place.mapped(private=True)


def test_another_file_of_that_number_is_not_taken() -> None:
    with MemoryFile(100) as made, MemoryFile(100) as other:
        with pytest.raises(OSError, match="is another file here"):
            Place(made.place.path, other.place.mark, 100).mapped(private=True)


def test_memory_is_gone_with_its_last_mapping() -> None:
    before = memory_files()
    with MemoryFile(4 * MEGABYTE) as made:
        mapping = made.place.mapped(private=True)
        assert memory_files() == before + 2  # the file, and its mapping
    assert memory_files() == before + 1
    del mapping
    assert memory_files() == before


def memory_files() -> int:
    """How many files in memory this process has open or mapped."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    links = [os.readlink(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd") if _there(each)]
    return sum("memfd:patchpipe" in each for each in (*maps, *links))


def _there(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")


# -- who shares ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"ulysses": 2}, [[0, 1], [0, 1]]),
        ({"pipefusion": 2, "ring": 2}, [[0, 1], [0, 1], [2, 3], [2, 3]]),
        ({"cfg": 2, "tensor": 2}, [[0, 2], [1, 3], [0, 2], [1, 3]]),
        ({"data": 2, "pipefusion": 2}, [[0, 2], [1, 3], [0, 2], [1, 3]]),
        ({"distrifusion": 2}, [[0, 1], [0, 1]]),
        ({"pipefusion": 3}, [[0], [1], [2]]),
    ],
)
def test_ranks_share_that_hold_the_same(layout: dict[str, int], expected: list[list[int]]) -> None:
    shape = ParallelConfig(**layout).mesh_shape  # type: ignore[arg-type]
    assert [list(sharing.holders(Mesh(shape, rank))) for rank in range(len(expected))] == expected


def paint(rank: Rank, config: ParallelConfig, name: str, prepare: Callable[[int, Any], None] | None = None) -> Any:
    """What a rank paints, and what it has in host memory."""
    pipe = tiny.pipeline(name)
    if prepare is not None:
        prepare(rank.rank, pipe)
    patchpipe.parallelize(pipe, config, group=rank.join(config))
    made = call_pipeline(pipe, arguments_for(config, name))
    told = None if config.offload is None else host_of(pipe)
    patchpipe.restore(pipe)
    return None if made is None else tiny.painted(made), told


def arguments_for(config: ParallelConfig, name: str) -> dict[str, Any]:
    several = {"num_images_per_prompt": 2, "seeds": [0, 1]} if config.data > 1 else {}
    return {**tiny.call_arguments(name), **several}


def beside(config: ParallelConfig, name: str = "flux", prepare: Any = None, run: Any = run_threads) -> list[Any]:
    """Paints without offload and with it, to the bit the same; what each rank has in host memory."""
    right = run(config.world_size, paint, replace(config, offload=None), name, prepare)
    found = run(config.world_size, paint, config, name, prepare)
    for (one, _), (other, _) in zip(right, found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    return [told for _, told in found]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("flux", {"ulysses": 2}),
        ("flux", {"distrifusion": 2, "warmup": 1}),
        ("sd3", {"cfg": 2, "ulysses": 2}),
        ("wan-a14b", {"ulysses": 2}),
    ],
)
def test_a_host_has_them_once(name: str, layout: dict[str, Any]) -> None:
    config = ParallelConfig(**{"warmup": "all", **layout}, offload=ALL, timeout=60)
    told = beside(config, name)
    assert len(set(map(str, told))) == 1
    total, shared, ranks = told[0]
    assert total == shared > 0
    assert ranks == list(range(config.world_size))


def test_stages_share_nothing_with_each_other() -> None:
    told = beside(ParallelConfig(pipefusion=2, ulysses=2, warmup="all", offload=ALL, timeout=60))
    assert [ranks for _, _, ranks in told] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert all(shared == total for total, shared, _ in told)


def test_slices_are_shared_by_those_that_have_them() -> None:
    told = beside(ParallelConfig(ulysses=2, tensor=2, warmup="all", offload=ALL, timeout=60))
    assert [ranks for _, _, ranks in told] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_one_rank_alone_packs_for_itself() -> None:
    [(total, shared, ranks)] = beside(ParallelConfig(warmup="all", offload=ALL))
    assert total > 0
    assert (shared, ranks) == (0, [])


def test_one_line_says_how_much_is_shared() -> None:
    lines = run_threads(2, lambda rank: attached(rank).patchpipe.offload.describe())
    assert lines[0] == lines[1]
    assert re.search(r"; \d\.\d MB in host memory, once for ranks 0, 1$", lines[0])
    alone = patchpipe.parallelize(tiny.pipeline("flux"), ParallelConfig(offload=ALL))
    assert re.search(r"; \d\.\d MB in host memory$", alone.patchpipe.offload.describe())
    assert "host memory" not in told_of_residents()


def told_of_residents() -> str:
    pipe = patchpipe.parallelize(tiny.pipeline("flux"), ParallelConfig(offload=OffloadConfig(resident=1.0)))
    return str(pipe.patchpipe.offload.describe())


# -- counted by the system -----------------------------------------------------------------------

BLOCKS, MATRIX = 6, 8 * 2**20


class Block(nn.Module):
    """A block of one matrix of 8 MiB."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.full((MATRIX // 4,), value, dtype=torch.float32))


def memory(kind: str) -> int:
    """This process's share of memory that it has mapped, by the system's own count."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def count(rank: Rank) -> dict[str, list[int]]:
    """Bytes of this rank, of its own and of those it shares, before and after every block."""
    group = rank.join(TWO)
    before = {kind: memory(kind) for kind in ("Pss_Anon", "Pss_Shmem")}
    blocks = [weights_of(Block(number), f"block {number}", lambda _: False) for number in range(BLOCKS)]
    shared = sharing.Sharing.among(group, sharing.digest_of(blocks, [()] * BLOCKS), None)
    found: dict[str, list[int]] = {kind: [] for kind in before}
    homes = []
    for weights in blocks:
        group.agree({})
        for kind, was in before.items():
            found[kind].append(memory(kind) - was)
        homes.append(shared.home(weights, pinned=False))
        for weight in weights:
            weight.settle()
    group.agree({})
    for kind, was in before.items():
        found[kind].append(memory(kind) - was)
    assert [int(home.piece(0, 4).view(torch.float32)[0]) for home in homes] == list(range(BLOCKS))
    group.agree({})
    return found


def test_two_ranks_take_the_memory_of_one() -> None:
    first, second = run_ranks(2, count)
    total, little = BLOCKS * MATRIX, MATRIX // 2
    for packed in range(BLOCKS + 1):
        left = (BLOCKS - packed) * MATRIX
        for rank in (first, second):  # what is not packed yet each has for itself, and of the rest nothing
            assert abs(rank["Pss_Anon"][packed] - left) < little
        both = first["Pss_Shmem"][packed] + second["Pss_Shmem"][packed]
        assert abs(both - packed * MATRIX) < little
    assert total > 40 * MEGABYTE


def mapped_bytes(kind: str) -> int:
    """Of this process's mappings of memory that ranks share."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = "memfd:patchpipe" in line
        elif ours and line.startswith(f"{kind}:"):
            found += 1024 * int(line.split()[1])
    return found


def painted_and_counted(rank: Rank) -> tuple[Tensor | None, tuple[int, int], tuple[int, int, list[int]]]:
    pipe = attached(rank)
    made = call_pipeline(pipe, tiny.call_arguments("flux"))
    pipe.patchpipe.group.agree({})
    counted = mapped_bytes("Rss"), mapped_bytes("Pss")
    pipe.patchpipe.group.agree({})
    return None if made is None else tiny.painted(made), counted, host_of(pipe)


def test_processes_paint_from_one_copy() -> None:
    plain = tiny.painted(call_pipeline(tiny.pipeline("flux"), tiny.call_arguments("flux")))
    found = run_ranks(2, painted_and_counted)
    assert torch.equal(found[0][0], run_threads(2, paint, replace(TWO, offload=None), "flux")[0][0])
    assert found[0][0].shape == plain.shape
    total, shared, _ = found[0][2]
    assert shared == total
    assert all(rss >= total for _, (rss, _), _ in found)
    assert sum(pss for _, (_, pss), _ in found) < 1.3 * total  # whole pages of every block
