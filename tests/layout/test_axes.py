"""The mesh and how totals are shared."""

from __future__ import annotations

import itertools

import pytest

from patchpipe.layout.axes import AXES, Mesh, shares


def test_last_axis_varies_fastest():
    mesh = Mesh((1, 2, 2, 1, 1, 2, 1), rank=5)
    assert [mesh.at(axis) for axis in AXES] == [0, 1, 0, 0, 0, 1, 0]
    assert mesh.along("ulysses") == (4, 5)
    assert mesh.along("pipe") == (5, 7)
    assert mesh.along("cfg") == (1, 5)


def test_every_rank_is_at_its_own_coordinates():
    sizes = (2, 2, 2, 1, 2, 1, 1)
    mesh = Mesh(sizes, rank=0)
    for rank in range(mesh.world_size):
        here = {axis: mesh.at(axis, rank) for axis in AXES}
        assert mesh.peer(**here) == rank


def test_parts_run_through_the_sequence_axes_and_a_maker_stands_at_tensor_0():
    sizes = (1, 1, 2, 1, 2, 3, 2)
    for rank in range(Mesh(sizes, 0).world_size):
        mesh = Mesh(sizes, rank)
        assert mesh.parts == 6
        maker = mesh.maker(data=0, cfg=0, pipe=1, part=mesh.part)
        assert maker == mesh.peer(pipe=1, tensor=0)


def test_stage_lists_its_ranks():
    assert Mesh((1, 2, 2, 1, 1, 1, 1), 0).stage(0) == (0, 2)


@pytest.mark.parametrize(("total", "parts"), [(0, 2), (1, 3), (7, 3), (8, 4), (5, 5)])
def test_shares_cover_the_total_evenly(total, parts):
    ranges = shares(total, parts)
    sizes = [stop - start for start, stop in ranges]
    assert len(ranges) == parts
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
