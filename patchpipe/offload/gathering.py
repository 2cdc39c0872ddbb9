"""Ranks that copy a part of every chunk each, over their own links, and give each other the rest.

Ranks of a Ulysses or Ring line need the same weights at the same time. Where they reach each other faster than a host
reaches one of them, as over NVLink, a chunk is there almost N times as soon.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patchpipe.distributed.agreement import gather
from patchpipe.distributed.exchange import Exchange
from patchpipe.distributed.mesh import Group
from patchpipe.errors import PatchpipeError
from patchpipe.layout.axes import Mesh
from patchpipe.layout.communicators import lines_of

LINES = ("ulysses_inner", "ulysses", "ring")  # over fast links first


def ranks_together(mesh: Mesh, inner: int) -> tuple[int, ...]:
    """The ranks that copy weights together with a rank of a layout that has Ulysses or Ring.

    Args:
        mesh: The mesh, with the rank.
        inner: Ranks of a Ulysses line that share a fast domain.
    """
    lines = lines_of(mesh, inner)
    return next(lines[name] for name in LINES if name in lines)


class Gathering:
    """One rank's side of it. Every rank of the line copies the same chunks in the same order.

    Args:
        name: What it is called on the store.
        line: The ranks, with a communicator of their own.
        group: All ranks.
    """

    def __init__(self, name: str, line: Exchange, group: Group) -> None:
        self._name, self._line, self._group = name, line, group
        self._told = 0

    @classmethod
    def over(cls, group: Group) -> Gathering:
        """That of a rank; all ranks make theirs at the same place.

        Raises:
            ValueError: Their parts would travel through the host that they come from.
        """
        if group.backend == "gloo" and group.device.type == "cuda":
            raise ValueError(
                "offload gathered=True sends weights from card to card, which gloo does through the host: use NCCL, a "
                "card for each rank, or leave it out"
            )
        ranks = ranks_together(group.mesh, group.config.ulysses_inner)
        line = group.open_line("weights", ranks)
        return cls(f"{line.wire.carries} of {ranks}", line, group)

    def own(self, size: int) -> slice:
        """This rank's part of a chunk of so many bytes."""
        return self._part(self._line.index, size)

    def fill(self, chunk: Tensor) -> None:
        """Has the other ranks' parts come to a chunk of which this rank's own is there.

        Over NCCL what is launched on the current stream afterwards comes after it; over gloo it waits.

        Raises:
            PatchpipeError: A rank of the line failed, or did not come to the same chunk in time.
        """
        self._line.complete([chunk[self._part(index, chunk.numel())] for index in range(self._line.size)])

    def compare(self, what: str, found: Any) -> None:
        """Makes sure that all ranks of the line have the same; without it one chunk could be taken for another.

        Args:
            what: What it is, for the message.
            found: What this rank has, plain data.

        Raises:
            PatchpipeError: Two ranks differ; every one of them raises it.
        """
        store, line, config = self._group.store, self._line, self._group.config
        assert store is not None
        told = gather(store, f"{self._name}/{self._told}", line.index, line.size, found, config.timeout)
        if self._told:  # all have read what was told before that
            store.delete_key(f"{self._name}/{self._told - 1}/{line.index}")
        self._told += 1
        if any(one != told[0] for one in told):
            raise PatchpipeError(
                f"ranks {', '.join(map(str, line.ranks))} copy weights together and differ in {what}, so that the "
                f"picture would be wrong: leave out gathered"
            )

    def _part(self, index: int, size: int) -> slice:
        each = -(-size // self._line.size)
        return slice(min(index * each, size), min((index + 1) * each, size))
