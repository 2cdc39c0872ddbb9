"""Long text is spread over the first patches, so that none costs much more than another."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest

from patchpipe import ParallelConfig
from patchpipe.models import PLANS
from patchpipe.models.latent import Raster
from patchpipe.stage.patches import Cut, balanced_rows, spread_of
from tests import tiny
from tests.support import parity
from tests.support.nccl_rules import over
from tests.support.threads import run_threads

FAMILIES = ("flux", "sd3", "qwen-padded", "flux2", "flux2-kv", "cogview4", "ovis", "longcat", "bria", "krea2",
            "lumina2", "ernie", "auraflow", "cogview3", "glm", "chroma", "ideogram4", "cogvideox", "easyanimate",
            "consisid")  # fmt: skip
THOROUGH, CLIPS = FAMILIES[:3], FAMILIES[-3:]
SCHEDULES: list[dict[str, Any]] = [
    {"patches": 3, "warmup": 1, "text_patches": 2},
    {"patches": 2, "warmup": 0, "text_patches": 2},
]
LAYOUTS: list[dict[str, int]] = [{"pipefusion": 2}, {"pipefusion": 3}, {"ulysses": 2}, {"ring": 2}]


@pytest.mark.some(of=4)
@pytest.mark.parametrize("name", FAMILIES)
def test_spread_text_is_what_it_means(name: str) -> None:
    """Every part of it is renewed by its own patch; the others are seen as they were one step before."""
    turn = FAMILIES.index(name)
    layouts = LAYOUTS[:2] if name in CLIPS else LAYOUTS  # whose frames are too few to be shared
    cases = [(layouts[(turn + at) % len(layouts)], SCHEDULES[at % 2]) for at in range(3 if name in THOROUGH else 1)]
    for layout, schedule in cases:
        with over("nccl"):
            errors = parity.differences(name, [layout], [schedule], run=run_threads)
        assert max(errors.values()) <= parity.tolerance(name), errors


def test_law_6_every_model_that_spreads_its_text_is_tested() -> None:
    tested = {type(tiny.pipeline(name).transformer).__name__ for name in FAMILIES}
    assert tested == {plan.model for plan in PLANS if plan.spreads_text}


def test_where_text_is_spread_shows() -> None:
    """The oracle would notice: other rows are stale."""
    one, two = ({**SCHEDULES[0], "text_patches": parts} for parts in (1, 2))
    right = [parity.expected("flux", parity.json.dumps(schedule), "{}") for schedule in (one, two)]
    assert parity.relative(*right) > 1e-6


@pytest.mark.parametrize(
    ("rows", "text", "patches", "spread"),
    [
        (Raster(64, 64, 64), 512, 8, 1),  # FLUX at 1024 pixels: 64 tokens over the mean
        (Raster(32, 32, 32), 512, 8, 3),  # at 512 pixels: else the first patch costs 2.8 times the mean
        (Raster(32, 32, 32), 512, 4, 2),
        (Raster(16, 16, 16), 512, 8, 6),
    ],
)
def test_no_patch_costs_much_more_than_another(rows: Raster, text: int, patches: int, spread: int) -> None:
    assert spread_of(rows, patches, text) == spread
    cut = Cut.of(rows, ParallelConfig(pipefusion=2, patches=patches), text, spreads=True)
    costs = [patch.token_count + patch.rider_range(text)[1] - patch.rider_range(text)[0] for patch in cut.patches]
    assert max(costs) <= 1.15 * sum(costs) / patches
    assert sum(costs) == rows.total + text
    assert [patch.rider_range(text) for patch in cut.patches][:spread] == list(
        pairwise(accumulate([text // spread + (at < text % spread) for at in range(spread)], initial=0))
    )


@pytest.mark.parametrize(
    ("rows", "joined", "text"), [(64, 64 * 64, 512), (64, 3 * 64 * 64 + 5, 512), (32, 32 * 32, 77)]
)
def test_references_are_spread_over_all_patches(rows: int, joined: int, text: int) -> None:
    """Kontext with a picture as large as the painted one, and others."""
    raster = Raster(rows, rows, rows, joined=joined)
    cut = Cut.of(raster, ParallelConfig(pipefusion=4, patches=8), text, spreads=True)
    riders = [(*patch.rider_range(text), *patch.reference_range) for patch in cut.patches]
    costs = [
        patch.token_count + stop - start + last - first
        for patch, (start, stop, first, last) in zip(cut.patches, riders, strict=True)
    ]
    assert max(costs) <= 1.15 * sum(costs) / 8
    assert sum(costs) == raster.total + joined + text
    assert [first for *_, first, _ in riders[1:]] == [last for *_, last in riders[:-1]]


def test_models_that_do_not_spread_keep_their_text_in_one_patch() -> None:
    cut = Cut.of(Raster(32, 32, 32), ParallelConfig(pipefusion=2, patches=8), 512)
    assert [patch.carries_riders for patch in cut.patches] == [True] + [False] * 7
    assert balanced_rows(Raster(32, 32, 32), 8, 512) == tuple(patch.rows[1] - patch.rows[0] for patch in cut.patches)


def test_more_parts_of_text_than_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="text_patches=3 is more than the 2 patches"):
        Cut.of(Raster(4, 4, 4), ParallelConfig(patches=2, text_patches=3), 8, spreads=True)
    with pytest.raises(ValueError, match="text_patches is for patches that stream"):
        ParallelConfig(distrifusion=2, text_patches=2)
