"""Which communicators a layout needs: a pair of ranks each for what goes one way, and one for every line of the mesh.

NCCL makes a communicator when two ranks first meet, and that blocks both. So all are made at start-up, in one order
that every rank keeps, and none in a request. What one communicator does it does in order. So the two directions between
two ranks have one each, lest a receive that waits for its data hold up a send.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from patchpipe.layout.axes import SEQUENCE_AXES, Axis, Mesh

LINE_AXES: tuple[Axis, ...] = (*SEQUENCE_AXES, "tensor")


@dataclass(frozen=True, order=True)
class Link:
    """One way from a rank to another."""

    sender: int
    receiver: int


def stage_links(mesh: Mesh) -> list[Link]:
    """From every stage to the next: hidden states."""
    return sorted(Link(rank, peer) for rank, peer in _neighbours(mesh))


def key_links(mesh: Mesh, boundaries: Sequence[int]) -> list[Link]:
    """Both ways between neighbouring stages that share a block: its keys and values.

    Args:
        mesh: The mesh.
        boundaries: The earlier stage of each such pair.
    """
    pairs = [(rank, peer) for rank, peer in _neighbours(mesh) if mesh.at("pipe", rank) in boundaries]
    return sorted(Link(*ends) for pair in pairs for ends in (pair, pair[::-1]))


def answer_links(mesh: Mesh) -> list[Link]:
    """From the ranks that make noise predictions to all that hold the latent."""
    last = mesh.size("pipe") - 1
    makers = [rank for rank in mesh.stage(last) if mesh.at("tensor", rank) == 0]
    return sorted(Link(maker, rank) for maker in makers for rank in mesh.stage(0) if rank != maker)


def line_axes(mesh: Mesh) -> list[Axis]:
    """The axes along which ranks exchange with all others of their line."""
    return [axis for axis in LINE_AXES if mesh.size(axis) > 1]


def lines_of(mesh: Mesh, inner: int = 1) -> dict[str, tuple[int, ...]]:
    """This rank's lines by name, in the order in which every rank makes them: of each its ranks.

    Args:
        mesh: The mesh.
        inner: Ranks of a Ulysses line that share a fast domain. Where these are some but not all, the line has two
            levels: ``ulysses_inner`` inside the domain, and ``ulysses_outer`` of those that stand alike in theirs.
    """
    found: dict[str, tuple[int, ...]] = {}
    for axis in line_axes(mesh):
        ranks, at = mesh.along(axis), mesh.at(axis)
        if axis == "ulysses" and 1 < inner < len(ranks):
            start = at - at % inner
            found["ulysses_inner"] = ranks[start : start + inner]
            found["ulysses_outer"] = ranks[at % inner :: inner]
        else:
            found[axis] = ranks
    return found


def count(mesh: Mesh, boundaries: Sequence[int] = (), inner: int = 1) -> dict[str, int]:
    """Communicators of this rank, by what they carry."""
    carried = {
        "streams": stage_links(mesh),
        "predictions": answer_links(mesh),
        "keys of shared blocks": key_links(mesh, boundaries),
    }
    found = {what: sum(mesh.rank in (link.sender, link.receiver) for link in links) for what, links in carried.items()}
    for name in lines_of(mesh, inner):
        found[name.replace("_", " ")] = 1
    return {what: number for what, number in found.items() if number}


def _neighbours(mesh: Mesh) -> Iterator[tuple[int, int]]:
    """Every rank with the one that stands where it does in the next stage."""
    for stage in range(mesh.size("pipe") - 1):
        for rank in mesh.stage(stage):
            yield rank, replace(mesh, rank=rank).peer(pipe=stage + 1)
