"""How a latent is cut."""

from __future__ import annotations

import pytest

from patchpipe import ParallelConfig
from patchpipe.layout.patching import PatchCosts, quickest
from patchpipe.models.latent import Raster
from patchpipe.stage.patches import Cut, balanced_rows


@pytest.mark.parametrize("rows", range(1, 20))
def test_even_patches_differ_by_one_row_and_the_first_is_never_larger(rows: int) -> None:
    for patches in range(1, rows + 1):
        sizes = balanced_rows(Raster(rows, 4, 1), patches)
        assert len(sizes) == patches
        assert sum(sizes) == rows
        assert max(sizes) - min(sizes) <= 1
        assert list(sizes) == sorted(sizes)


@pytest.mark.parametrize(
    ("count", "tokens", "patches", "text", "sizes"),
    [
        (32, 32, 2, 64, (15, 17)),  # 544 tokens each
        (64, 64, 4, 512, (10, 18, 18, 18)),  # 1,152 each
        (64, 64, 8, 512, (1, 9, 9, 9, 9, 9, 9, 9)),
        (8, 8, 4, 512, (1, 2, 2, 3)),
        (3, 1, 3, 9, (1, 1, 1)),
    ],
)
def test_the_patch_that_carries_the_text_is_smaller(count, tokens, patches, text, sizes) -> None:
    assert balanced_rows(Raster(count, tokens, 1), patches, text) == sizes


def test_a_patch_that_ranks_share_has_a_row_for_each() -> None:
    assert balanced_rows(Raster(12, 1, 1), 3, text=100, fewest=2) == (2, 5, 5)
    assert balanced_rows(Raster(3, 1, 1), 3, text=100, fewest=2) == (1, 1, 1)


def test_a_cut_speaks_of_rows_tokens_and_units_of_the_latent() -> None:
    cut = Cut.of(Raster(count=5, tokens=3, units=2), ParallelConfig(patches=2))
    first, second = cut.patches
    assert (first.rows, first.tokens, first.units) == ((0, 2), (0, 6), (0, 4))
    assert (second.rows, second.tokens, second.units) == ((2, 5), (6, 15), (4, 10))
    assert cut.bounds == (0, 4, 10)
    assert [patch.carries_riders for patch in cut.patches] == [True, False]
    assert (second.token_count, second.total_tokens) == (9, 15)
    assert cut.whole.whole
    assert cut.whole.carries_riders
    assert cut.whole.tokens == (0, 15)


def test_uneven_patches_are_taken_as_given() -> None:
    cut = Cut.of(Raster(count=6, tokens=1, units=1), ParallelConfig(patch_rows=(3, 1, 2)))
    assert cut.bounds == (0, 3, 4, 6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"patches": 7}, "patches=7 is more than the 6 token rows of this picture: use patches=6 or fewer"),
        ({"patch_rows": (3, 2)}, r"patch_rows=\(3, 2\) adds up to 5 token rows but this picture has 6"),
    ],
)
def test_a_cut_that_does_not_fit_the_picture_is_refused(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Cut.of(Raster(count=6, tokens=1, units=1), ParallelConfig(**options))


@pytest.mark.parametrize(
    ("stages", "tokens", "hop", "beside", "patches"),
    [
        (1, 4096, 0.5, 16, 1),
        (2, 1088, 0.003, 16, 2),  # a hop costs less than another patch
        (2, 4608, 0.004, 128, 2),
        (2, 4608, 0.004, 16, 4),  # further ones are cheap, and the last stage waits for less
        (8, 4608, 0.017, 128, 8),
        (8, 4608, 0.1, 128, 9),
        (8, 4608, 0.3, 128, 10),
        (4, 64, 0.1, 128, 4),  # patches would be too small
        (4, 16384, 1.0, 128, 8),  # as slow a link as the stage: M = N (1 + c/t)
        (4, 16384, 9.0, 128, 16),
    ],
)
def test_as_many_patches_as_make_a_request_short(
    stages: int, tokens: int, hop: float, beside: float, patches: int
) -> None:
    assert quickest(stages, tokens, PatchCosts(hop, beside)) == patches


@pytest.mark.parametrize(
    ("stages", "tokens", "hop", "beside", "patches"),
    [
        (2, 4608, 0.004, 128, 2),
        (2, 4608, 0.004, 16, 3),
        (2, 64, 0.004, 16, 2),  # with one there would be nothing stale
        (8, 4608, 0.017, 128, 5),  # not 4: the second half of a patch is back one stage's time after the first
        (8, 4608, 0.3, 128, 6),
        (16, 4608, 0.017, 128, 9),
    ],
)
def test_two_halves_of_every_patch_need_half_as_many(
    stages: int, tokens: int, hop: float, beside: float, patches: int
) -> None:
    assert quickest(stages, tokens, PatchCosts(hop, beside), halves=2) == patches


def test_the_number_chosen_for_the_user_is_no_more_than_there_are_rows() -> None:
    rows = Raster(3, 4096, 1)
    assert len(Cut.of(rows, ParallelConfig(pipefusion=2), costs=PatchCosts(hop=1.0)).patches) == 3
    assert len(Cut.of(rows, ParallelConfig()).patches) == 1
