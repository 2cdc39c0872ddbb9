"""Ranks of one host that hold the same weights have them once in host memory, and none sees what another writes."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import patchpipe
from patchpipe import Engine, OffloadConfig, ParallelConfig
from patchpipe.distributed import joining
from patchpipe.errors import RankFailed, RankLost
from patchpipe.layout.axes import Mesh
from patchpipe.offload import offload as offloading
from patchpipe.offload.shared import file, home, peers, sharing
from patchpipe.offload.shared.file import MemoryFile, Place
from patchpipe.offload.weights import give_back, weights_of
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
    with MemoryFile(100) as made, MemoryFile(100) as other, pytest.raises(OSError, match="is another file here"):
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
    gc.collect()
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


@pytest.mark.some(of=2)
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


def let_go(_rank: Rank) -> tuple[int, int]:
    """Bytes that stay with a process which lets matrices of middling size go, and when it has given them back."""
    del [torch.ones(MATRIX // 2)][:]  # from then on the C library keeps what is smaller than this
    before = memory("Pss_Anon")
    matrices = [torch.ones(MATRIX // 4) for _ in range(BLOCKS)]
    kept = matrices.pop()
    matrices.clear()
    left = memory("Pss_Anon") - before
    give_back()
    assert float(kept[0]) == 1
    return left, memory("Pss_Anon") - before


def test_what_is_let_go_goes_back_to_the_system() -> None:
    [(left, after)] = run_ranks(1, let_go)
    assert left > (BLOCKS - 1) * MATRIX
    assert after < 2 * MATRIX


def mapped_bytes(kind: str) -> int:
    """Of this process's mappings of memory that ranks share."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = "memfd:patchpipe" in line
        elif ours and line.startswith(f"{kind}:"):
            found += 1024 * int(line.split()[1])
    return found


def painted_and_counted(rank: Rank) -> tuple[Any, tuple[int, int], tuple[int, int, list[int]]]:
    pipe = attached(rank)
    made = call_pipeline(pipe, tiny.call_arguments("flux"))
    pipe.patchpipe.group.agree({})
    counted = mapped_bytes("Rss"), mapped_bytes("Pss")
    pipe.patchpipe.group.agree({})
    return None if made is None else np.asarray(tiny.painted(made)), counted, host_of(pipe)


def test_processes_paint_from_one_copy() -> None:
    found = run_ranks(2, painted_and_counted)
    expected = run_threads(2, paint, replace(TWO, offload=None), "flux")[0][0]
    assert np.array_equal(found[0][0], expected)
    total, shared, _ = found[0][2]
    assert shared == total
    assert all(rss >= total for _, (rss, _), _ in found)
    assert sum(pss for _, (_, pss), _ in found) < 1.3 * total  # whole pages of every block


# -- read from files -----------------------------------------------------------------------------


def lies_in_a_model_file(tensor: Tensor) -> bool:
    """Whether a tensor's bytes are those of a file that is mapped, of which the system keeps what it can."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if int(first, 16) <= tensor.data_ptr() < int(last, 16):
            return line.endswith(".safetensors")
    raise AssertionError("it lies nowhere")


@pytest.mark.some(of=3)
@pytest.mark.parametrize(("dtype", "read"), [(None, False), ("bf16", True)])
@pytest.mark.parametrize("resident", [0.0, 0.4])
def test_blocks_are_packed_from_the_models_files(
    dtype: str | None, read: bool, resident: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rank has its blocks in memory of its own before they are packed, unless their dtype is to be another."""
    folder, packed = tiny.save("flux", tmp_path / "flux"), []

    def home(self: sharing.Sharing, weights: Any, *, pinned: bool) -> Any:
        packed.extend(lies_in_a_model_file(one) for weight in weights for one in weight.plain)
        return original(self, weights, pinned=pinned)

    original = sharing.Sharing.home
    monkeypatch.setattr(sharing.Sharing, "home", home)

    def load(rank: Rank, config: ParallelConfig) -> Any:
        pipe = patchpipe.from_pretrained(folder, config, group=rank.join(config), dtype=dtype)
        made = call_pipeline(pipe, tiny.call_arguments("flux"))
        assert not any(lies_in_a_model_file(one) for block in blocks_of(pipe) for one in block.parameters())
        told = None if config.offload is None else host_of(pipe)
        return None if made is None else tiny.painted(made), told

    config = replace(TWO, offload=OffloadConfig(resident=resident, chunk=0.01))
    right, found = (run_threads(2, load, each) for each in (replace(config, offload=None), config))
    assert torch.equal(right[0][0], found[0][0])
    assert all(shared == total > 0 for _, (total, shared, _) in found)
    assert set(packed) == {not read}


@pytest.mark.extra
def test_an_engines_ranks_share_and_say_so(tmp_path: Path) -> None:
    folder, call = tiny.save("flux", tmp_path / "flux"), tiny.call_arguments("flux", steps=2)
    made = []
    for config in (replace(TWO, offload=None), TWO):
        with Engine(folder, config, devices="cpu", threads=1) as engine:
            result = engine.generate(generator=torch.Generator().manual_seed(0), output_type="latent", **call)
            made.append((result.output.images, result.stats.get("offload")))
    (expected, none), (painted, told) = made
    assert torch.equal(expected, painted)
    assert none is None
    assert told["host_shared_bytes"] == told["host_bytes"] > 0
    assert told["host_ranks"] == [0, 1]


# -- who writes ----------------------------------------------------------------------------------


def fused_and_back(rank: Rank, config: ParallelConfig, path: Path) -> list[tuple[Any, Any]]:
    """What is painted bare, with LoRA beside the matrices, in them, and taken out again."""
    pipe = attached(rank, config)
    found = []
    steps = (lambda: None, lambda: pipe.load_lora_weights(path), pipe.fuse_lora, pipe.unfuse_lora)
    for step in (*steps, pipe.unload_lora_weights):
        step()
        made = call_pipeline(pipe, arguments_for(config, "flux"))
        told = None if config.offload is None else host_of(pipe)
        found.append((None if made is None else np.asarray(tiny.painted(made)), told))
    patchpipe.restore(pipe)
    return found


@pytest.mark.extra
@pytest.mark.parametrize("layout", [{"ulysses": 2}, {"data": 2}])
def test_lora_is_fused_once_by_every_rank(layout: dict[str, Any], tmp_path: Path) -> None:
    path = loras.save(tiny.pipeline("flux"), tmp_path)
    config = ParallelConfig(**layout, warmup="all", offload=ALL, timeout=60)
    right = run_ranks(2, fused_and_back, replace(config, offload=None), path)[0]
    ranks = run_ranks(2, fused_and_back, config, path)
    for (expected, _), (painted, _) in zip(right, ranks[0], strict=True):
        assert np.array_equal(painted, expected)
    assert not np.array_equal(right[0][0], right[2][0])
    for _, (total, shared, _) in (*ranks[0], *ranks[1]):
        assert total == shared > 0  # also of what each has fused for itself: it is the same again


def changed_on_the_way(rank: Rank, config: ParallelConfig, path: Path) -> Any:
    """What is painted where LoRA is fused after the second step."""
    pipe = attached(rank, config)

    def then(pipe: Any, step: int, _time: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe.load_lora_weights(path)
            pipe.fuse_lora()
        return kept

    made = call_pipeline(pipe, {**arguments_for(config, "flux"), "callback_on_step_end": then})
    return None if made is None else np.asarray(tiny.painted(made))


@pytest.mark.extra
def test_lora_fused_between_two_steps_is_shared_again(tmp_path: Path) -> None:
    path = loras.save(tiny.pipeline("flux"), tmp_path)
    config = ParallelConfig(pipefusion=2, ulysses=2, warmup="all", offload=ALL, timeout=60)
    right, found = (run_ranks(4, changed_on_the_way, each, path) for each in (replace(config, offload=None), config))
    assert np.array_equal(right[0], found[0])
    assert not np.array_equal(right[0], np.asarray(run_threads(4, paint, config, "flux")[0][0]))


def test_a_rank_that_writes_writes_for_itself() -> None:
    def work(rank: Rank) -> tuple[bool, bool]:
        pipe = attached(rank)
        before = [one.detach().clone() for block in blocks_of(pipe) for one in block.parameters()]
        group = pipe.patchpipe.group
        group.agree({})
        patchpipe.restore(pipe)
        with torch.no_grad():
            if rank.rank == 0:
                for block in blocks_of(pipe):
                    for one in block.parameters():
                        one.add_(1.0)
        time.sleep(0.2)
        after = [one.detach() for block in blocks_of(pipe) for one in block.parameters()]
        same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
        return all(same), any(same)

    assert run_threads(2, work) == [(False, False), (True, True)]


def test_what_was_written_in_place_is_refused() -> None:
    pipe = tiny.pipeline("flux")
    patchpipe.parallelize(pipe, ParallelConfig(offload=ALL))
    call_pipeline(pipe, tiny.call_arguments("flux"))
    with torch.no_grad():
        blocks_of(pipe)[1].attn.to_q.weight.mul_(2)
    with pytest.raises(ValueError, match=r"weight of transformer_blocks\.1 was written in place .*restore\(pipe\)"):
        call_pipeline(pipe, tiny.call_arguments("flux"))


def test_what_the_device_copies_by_itself_is_shared_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As with CUDA, where locked memory is mapped apart from that in which parameters lie."""
    locked: list[int] = []
    monkeypatch.setattr(home, "pin", lambda memory: not locked.append(memory.data_ptr()))
    monkeypatch.setattr(home, "unpin", lambda memory: locked.remove(memory.data_ptr()))
    monkeypatch.setattr(sharing.Sharing, "home", partialmethod(_pinned, sharing.Sharing.home))
    total, shared, ranks = beside(TWO)[0]
    assert (shared, ranks) == (total, [0, 1])
    assert not locked  # all of it was let go in the end


def _pinned(self: sharing.Sharing, home: Callable[..., Any], weights: Any, *, pinned: bool) -> Any:
    assert not pinned
    return home(self, weights, pinned=True)


# -- what cannot be shared -----------------------------------------------------------------------


def other_values(rank: int, pipe: Any) -> None:
    """The second rank has other values in one block: a LoRA was fused there, say."""
    if rank == 1:
        with torch.no_grad():
            blocks_of(pipe)[0].attn.to_q.weight.mul_(1.5)


def other_layout(rank: int, pipe: Any) -> None:
    """The second rank's matrix has the same values in another order."""
    if rank == 1:
        weight = blocks_of(pipe)[0].attn.to_q.weight
        weight.data = weight.data.t().contiguous().t()


def test_blocks_that_differ_are_not_shared(caplog: pytest.LogCaptureFixture) -> None:
    config = ParallelConfig(data=2, warmup="all", offload=ALL, timeout=60)
    for total, shared, ranks in beside(config, prepare=other_values):
        assert ranks == [0, 1]
        assert 0 < shared < total
    told = [record.getMessage() for record in caplog.records if "share" in record.getMessage()]
    assert told == [
        "offload: rank 1 does not share all its weights with ranks 0: "
        "transformer_blocks.0.attn.to_q.weight has other values there"
    ]


def test_ranks_that_would_pack_otherwise_share_nothing(caplog: pytest.LogCaptureFixture) -> None:
    config = ParallelConfig(data=2, warmup="all", offload=ALL, timeout=60)
    for total, shared, ranks in beside(config, prepare=other_layout):
        assert total > 0
        assert (shared, ranks) == (0, [])
    told = [record.getMessage() for record in caplog.records]
    assert sum("they have other weights, or have chosen others to stay" in line for line in told) == 2


def test_two_kinds_of_ranks_share_each_among_themselves() -> None:
    def prepare(rank: int, pipe: Any) -> None:
        other_layout(rank // 2, pipe)

    config = ParallelConfig(data=2, ulysses=2, warmup="all", offload=ALL, timeout=60)
    told = beside(config, prepare=prepare)
    assert [ranks for _, _, ranks in told] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert all(shared == total for total, shared, _ in told)


def test_blocks_leave_nothing_in_the_store() -> None:
    def work(rank: Rank) -> list[int]:
        group, counts = rank.join(TWO), []
        for many in (1, 5):
            blocks = [weights_of(Tiny(number), f"block {number}", lambda _: False) for number in range(many)]
            shared = sharing.Sharing.among(group, sharing.digest_of(blocks, []), None)
            homes = [shared.home(weights, pinned=False) for weights in blocks]
            assert all(each.shared for each in homes)
            group.agree({})
            assert rank.store is not None
            counts.append(rank.store.num_keys())
            group.agree({})
        return counts

    few, many = run_threads(2, work)[0]
    assert many - few <= 2 + 3 * 2  # what each rank says first, and the agreements of this test


class Tiny(nn.Module):
    """A block of a few numbers."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.full((100,), value, dtype=torch.float32))


def test_ranks_of_other_hosts_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "host_name", lambda: threading.current_thread().name)
    assert [(shared, ranks) for _, shared, ranks in beside(TWO)] == [(0, []), (0, [])]


def test_ranks_in_containers_of_one_host_share_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def here(cls: type[joining.Process]) -> joining.Process:
        return cls("one", threading.current_thread().name, os.getpid())

    monkeypatch.setattr(joining.Process, "here", classmethod(here))
    assert [(shared, ranks) for _, shared, ranks in beside(TWO)] == [(0, []), (0, [])]
    told = sorted(record.getMessage() for record in caplog.records if "share" in record.getMessage())
    assert len(told) == 2
    assert told[0].startswith("offload: rank 0 shares no weights with ranks 1: they are on this machine, but in a")


def test_a_file_that_cannot_be_mapped_is_not_shared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = Place.mapped

    def forbidden(place: Place, *, private: bool) -> Tensor:
        if threading.current_thread().name == "rank 1":
            raise PermissionError(f"{place.path}: this process may not")
        return original(place, private=private)

    monkeypatch.setattr(Place, "mapped", forbidden)
    assert [(shared, ranks) for _, shared, ranks in beside(TWO)] == [(0, []), (0, [])]
    told = [record.getMessage() for record in caplog.records if "share" in record.getMessage()]
    assert len(told) == 1
    assert re.search("rank 1 does not share all its weights with ranks 0: /proc/.*this process may not", told[0])


def test_too_little_memory_for_files_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_file: int, _start: int, size: int) -> None:
        raise OSError(f"there are no {size} bytes")

    monkeypatch.setattr(file.os, "posix_fallocate", full)
    before = memory_files()
    assert [(shared, ranks) for _, shared, ranks in beside(TWO)] == [(0, []), (0, [])]
    assert memory_files() == before
    told = [record.getMessage() for record in caplog.records if "share" in record.getMessage()]
    assert len(told) == 2
    assert any("rank 0 found: there are no" in line for line in told)


# -- the end -------------------------------------------------------------------------------------


def test_nothing_is_left_of_several_models_and_rounds() -> None:
    before = memory_files()

    def work(rank: Rank) -> int:
        pipes = [tiny.pipeline("flux"), tiny.pipeline("sd3")]
        counted = 0
        for _ in range(2):
            for pipe, name in zip(pipes, ("flux", "sd3"), strict=True):
                patchpipe.parallelize(pipe, TWO, group=rank.join(TWO))
                call_pipeline(pipe, tiny.call_arguments(name))
            pipes[0].patchpipe.group.agree({})
            counted = max(counted, memory_files())
            pipes[0].patchpipe.group.agree({})
            for pipe in pipes:
                patchpipe.restore(pipe)
        return counted

    assert min(run_threads(2, work)) > before
    assert memory_files() == before


def test_no_file_stays_open() -> None:
    def work(rank: Rank) -> list[str]:
        pipe = attached(rank)
        pipe.patchpipe.group.agree({})
        links = [os.readlink(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd") if _there(each)]
        pipe.patchpipe.group.agree({})
        return [link for link in links if "patchpipe-" in link]

    assert run_threads(2, work) == [[], []]


# -- ranks that fail -----------------------------------------------------------------------------


def dies(rank: Rank, when: str) -> str | None:
    """The second rank dies when it comes to a point; what the first one makes of it."""
    if rank.rank == 1:
        owner, name = (offloading, "digest_of") if when == "before" else (sharing, "SharedHome")
        setattr(owner, name, lambda *_, **__: os._exit(1))
    began = time.monotonic()
    pipe = tiny.pipeline("flux")
    try:
        config = replace(TWO, timeout=100)
        patchpipe.parallelize(pipe, config, group=rank.join(config))
    except (RankLost, RankFailed) as error:
        return f"{type(error).__name__} after {time.monotonic() - began < 20}: {error}"
    return None


@pytest.mark.parametrize("when", ["before", "while packing"])
def test_a_rank_that_dies_is_named_at_once(when: str) -> None:
    told = run_ranks(2, dies, when, mortal=[1])[0]
    assert re.search("^RankLost after True: rank 1 .*: its process has died or was killed", told)


def test_a_rank_that_is_late_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take long to read its part of a model, and less to pack a block."""
    monkeypatch.setattr(peers, "LOADING_SECONDS", 3.0)

    def work(rank: Rank) -> str:
        group = rank.join(replace(TWO, timeout=1.0))
        talk = peers.Peers(group.store, rank.rank, {0: os.getpid(), 1: os.getpid()}, group.failures, 1.0)
        if rank.rank == 1:
            time.sleep(2)
        assert talk.greet(rank.rank) == {0: 0, 1: 1}
        if rank.rank == 0:
            with pytest.raises(RankLost) as raised:
                talk.hear("block 1", 1)
            return str(raised.value)
        time.sleep(3)
        return ""

    assert run_threads(2, work)[0] == "rank 1 did not answer within 1 s (timeout=1)"


def test_a_problem_of_one_rank_is_told_by_the_others() -> None:
    def work(rank: Rank) -> str:
        pipe = tiny.pipeline("flux")
        if rank.rank == 1:
            blocks_of(pipe)[0].attn.to_q.weight = nn.Parameter(Odd(blocks_of(pipe)[0].attn.to_q.weight.data))
        with pytest.raises((ValueError, RankFailed)) as raised:
            patchpipe.parallelize(pipe, TWO, group=rank.join(TWO))
        return f"{raised.type.__name__}: {raised.value}"

    first, second = run_threads(2, work)
    assert second.startswith("ValueError: transformer_blocks.0.attn.to_q.weight is a Odd, which cannot be taken apart")
    assert first == f"RankFailed: rank 1 failed first: {second}"


class Odd(Tensor):
    """A tensor of a kind that nobody knows."""
