"""Ranks: who stands where, what they share, what they say when one fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from patchpipe import ParallelConfig, RankFailed
from patchpipe.distributed.joining import join
from tests.support.ranks import Place, run_ranks


def config(place: Place, **options: Any) -> ParallelConfig:
    return ParallelConfig(pipefusion=place.world_size, timeout=20.0, **options)


def places(place: Place) -> tuple[bool, bool, bool]:
    group = place.join(config(place, output_rank=1))
    return group.first, group.last, group.output


def test_every_rank_knows_its_place() -> None:
    assert run_ranks(3, places) == [(True, False, False), (False, False, True), (False, True, False)]
    alone = join(ParallelConfig(), rank=0, world_size=1, device="cpu")
    assert (alone.first, alone.last, alone.output) == (True, True, True)


def too_many(place: Place) -> str:
    with pytest.raises(ValueError) as caught:
        place.join(ParallelConfig(pipefusion=2, timeout=20.0))
    return str(caught.value)


def test_a_wrong_number_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in run_ranks(3, too_many):
        assert "needs 2 ranks (pipefusion 2" in text
        assert "but 3 were started: use `torchrun --nproc-per-node 2`" in text
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=r"needs 4 ranks .* but 1 were started"):
        join(ParallelConfig(pipefusion=4))


def test_nccl_on_a_processor_is_refused() -> None:
    with pytest.raises(
        AssertionError, match=r"backend='nccl' needs CUDA devices but rank . computes on cpu: use 'gloo'"
    ):
        run_ranks(2, join_with_nccl)


def join_with_nccl(place: Place) -> None:
    place.join(config(place, backend="nccl"))


def sharing(place: Place) -> tuple[Any, Any, list[str]]:
    group = place.join(config(place))
    mine = torch.arange(6.0).to(torch.bfloat16).reshape(2, 3) if place.rank == 1 else None
    broadcast = group.broadcast(mine, 1, torch.Size((2, 3)), torch.bfloat16)
    value = group.share(2, lambda: {"rank": place.rank, "tensor": torch.ones(2), "nothing": None})
    texts = []
    for error in (ValueError("the prompt is too long"), LookupError("odd")):

        def fail(error: Exception = error) -> None:
            raise error

        try:
            group.share(0, fail)
        except Exception as raised:
            texts.append(f"{type(raised).__name__}: {raised}")
    return broadcast.float().numpy(), (value["rank"], value["tensor"].sum().item(), value["nothing"]), texts


def test_what_one_rank_computes_or_raises_all_get() -> None:
    ranks = run_ranks(3, sharing)
    for broadcast, value, texts in ranks:
        assert broadcast.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert value == (2, 1 + 1, None)
        assert texts[0] == "ValueError: the prompt is too long"
        assert "LookupError: odd" in texts[1]


def disagreeing(place: Place) -> str:
    group = place.join(config(place))
    group.agree({"same": [1, (2, 3)], "none": None})
    with pytest.raises(ValueError) as caught:
        group.agree({"warmup": 1 + (place.rank == 2), "same": "yes"})
    return str(caught.value)


def test_ranks_that_disagree_all_say_the_same() -> None:
    texts = run_ranks(3, disagreeing)
    assert len(set(texts)) == 1
    assert "warmup is 1 on rank 0 but 2 on rank 2" in texts[0]


def failing(place: Place) -> str:
    """Two failures reported one after the other, then a connection that breaks."""
    group = place.join(config(place))
    store = place.store
    if place.rank == 1:
        group.failures.report("ValueError: the first")
        store.set("told", "yes")
        store.wait(["told too"])
        group.close()
        return ""
    if place.rank == 2:
        store.wait(["told"])
        group.failures.report("KeyError: the second")
        store.set("told too", "yes")
    store.wait(["told too"])
    with pytest.raises(RankFailed) as caught:
        group.share(1, dict)
    return str(caught.value)


def test_the_first_failure_is_what_every_rank_reads() -> None:
    _, *_ = texts = run_ranks(3, failing)
    assert texts == ["rank 1 failed first: ValueError: the first", "", "rank 1 failed first: ValueError: the first"]


def two_groups(place: Place) -> list[float]:
    """Groups of one process do not hear each other, in whatever order they are used."""
    groups = [place.join(config(place)) for _ in range(2)]
    received = []
    if place.rank == 0:
        for number in (1, 0):
            groups[number].channel_to_next().send(torch.tensor([float(number)]))
        for group in groups:
            group.channel_to_next().drain()
        return []
    for number in (0, 1):
        received.append(groups[number].channel_from_previous().expect((1,), torch.float32).take().item())
    return received


def test_two_groups_between_the_same_ranks_are_apart() -> None:
    assert run_ranks(2, two_groups)[1] == [0.0, 1.0]
