"""A layout in words and figures: who is where, what travels, how many communicators there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from patchpipe.layout.axes import AXES, Mesh
from patchpipe.layout.communicators import count
from patchpipe.layout.split import shared_blocks, split_costs
from patchpipe.layout.volume import FLUX_AT_1024, traffic


def ranks_table(shape: tuple[int, ...], holdings: Sequence[str]) -> list[tuple[str, ...]]:
    """A header and a row for each rank: its coordinates on the axes in use, and what it holds.

    Args:
        shape: Sizes of the axes, as ``ParallelConfig.mesh_shape`` has them.
        holdings: What each rank holds.
    """
    used = [axis for axis, size in zip(AXES, shape, strict=True) if size > 1]
    rows: list[tuple[str, ...]] = [("rank", *used, "holds")]
    for rank, held in enumerate(holdings):
        mesh = Mesh(shape, rank)
        rows.append((str(rank), *(str(mesh.at(axis)) for axis in used), held))
    return rows


def describe_ranks(
    title: str, shape: tuple[int, ...], holdings: Sequence[str], *, share: bool | None, inner: int = 1
) -> str:
    """A layout as plain text: the mesh, then a line for each rank.

    Args:
        title: The layout in a line.
        shape: Sizes of the axes, as ``ParallelConfig.mesh_shape`` has them.
        holdings: What each rank holds.
        share: Whether stages may share a block; ``None`` where it is worth it.
        inner: Ranks of a Ulysses line that share a fast domain.
    """
    rows = ranks_table(shape, holdings)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    mesh = " × ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True) if size > 1)
    head = [title, f"{len(holdings)} ranks: {mesh or 'one device'}"]
    return "\n".join([*head, *lines, *_expected(shape, share, inner), *communicators(shape, inner)])


def communicators(shape: tuple[int, ...], inner: int = 1) -> list[str]:
    """How many communicators a rank makes at start-up, of the rank that makes most.

    Args:
        shape: Sizes of the axes, as ``ParallelConfig.mesh_shape`` has them.
        inner: Ranks of a Ulysses line that share a fast domain.
    """
    every = [count(Mesh(shape, rank), inner=inner) for rank in range(prod(shape))]
    most = max(every, key=lambda found: sum(found.values()))
    if not most:
        return []
    told = ", ".join(f"{what} {number}" for what, number in most.items())
    return [f"communicators over NCCL, all made at start-up, on a rank: at most {sum(most.values())} ({told})"]


def _expected(shape: tuple[int, ...], share: bool | None, inner: int) -> list[str]:
    """What a rank sends in a step, for a model everybody knows the size of."""
    blocks = FLUX_AT_1024.attended // FLUX_AT_1024.tokens
    split = split_costs([1.0] * blocks, min(shape[AXES.index("pipe")], blocks), shared=share)
    volume = replace(FLUX_AT_1024, shared=len(shared_blocks(split)) * FLUX_AT_1024.tokens)
    sent = [f"{method} {size / 1e6:,.0f} MB" for method, size in traffic(shape, volume, inner).items()]
    told = f"sends per step for FLUX.1 at 1024×1024 in bf16: {', '.join(sent)}"
    if sent:
        return [told + "; for other models `patchpipe explain MODEL`"]
    return ["sends per step: its noise predictions alone"] if prod(shape) > 1 else []
