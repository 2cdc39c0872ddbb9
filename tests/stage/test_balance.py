"""Stages are balanced by what their blocks cost."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from patchpipe import ParallelConfig
from patchpipe.layout.split import balanced, shared_blocks, sizes_of, split_costs, stages_of
from patchpipe.loading.precheck import check_folder
from patchpipe.models import plan_for
from patchpipe.stage.balance import block_cost, patch_costs, split_blocks
from tests import tiny


def cheapest(costs: list[float], stages: int) -> float:
    """The dearest stage of the best split, by trying every one."""
    ends = range(1, len(costs))
    splits = ([0, *inner, len(costs)] for inner in combinations(ends, stages - 1))
    return min(max(sum(costs[a:b]) for a, b in pairwise(s)) for s in splits)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("costs", [[1.0] * 7, [5, 1, 1, 1, 1, 1.5], [1, 1, 1, 1, 9], [3, 2.5, 1, 4, 1, 5, 9, 2, 6]])
def test_no_split_has_a_cheaper_dearest_stage(costs: list[float], stages: int) -> None:
    sizes = balanced(costs, stages)
    assert len(sizes) == stages
    assert sum(sizes) == len(costs)
    assert min(sizes) >= 1
    stops = [sum(sizes[:stage]) for stage in range(stages + 1)]
    dearest = max(sum(costs[a:b]) for a, b in pairwise(stops))
    assert dearest == pytest.approx(cheapest(costs, stages))


def test_of_equally_good_splits_the_most_even_is_taken() -> None:
    """No stage holds, or idles, more than it must: 57 blocks on 8 stages are not 4, 7, 7, 7, 8, 8, 8, 8."""
    assert sorted(balanced([1.0] * 57, 8)) == [7] * 7 + [8]
    assert sorted(balanced([0.1] * 28, 8)) == [3] * 4 + [4] * 4
    assert balanced([3, 1, 1, 1, 1, 1], 3) == (1, 2, 3)


def test_a_dual_stream_block_of_flux_costs_what_its_image_stream_does() -> None:
    """The nominal picture has 4,096 image and 512 text tokens, so the text stream weighs an eighth."""
    model = tiny.pipeline("flux").transformer
    places = plan_for(model).blocks_of(model)
    double, single = block_cost(places[0]), block_cost(places[-1])
    width, image, text = 32, 4096, 512
    attention = 2 * (image + text) ** 2 * width
    # qkv and out: 4 w², feed-forward: 8 w², of each stream
    assert double == pytest.approx(12 * width**2 * (image + text) + attention)
    # qkv: 3 w², mlp: 4 w², out of both: 5 w², over one sequence
    assert single == pytest.approx(12 * width**2 * (image + text) + attention)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_stages_cover_all_blocks_in_order(name: str) -> None:
    model = tiny.pipeline(name, blocks=6).transformer
    plan = plan_for(model)
    for stages in range(1, 7):
        split = split_blocks(model, plan, ParallelConfig(pipefusion=stages))
        for turns in (1, 2, 5, 8):
            for turn in range(turns):
                assert [index for owned in split for index in owned.of(turn, turns)] == list(range(6))
        assert [index for owned in split for index in owned.whole] == list(range(6))
    chosen = split_blocks(model, plan, ParallelConfig(pipefusion=3, stage_blocks=(1, 4, 1)))
    assert [owned.held for owned in chosen] == [range(1), range(1, 5), range(5, 6)]


def test_halves_of_a_batch_share_out_the_blocks_that_do_not_divide() -> None:
    """28 blocks on 8 stages: in a step of both halves each stage runs 7, none holds more than 4."""
    split = split_costs([1.0] * 28, 8, halved=True)
    assert [len(stage.of(0)) + len(stage.of(1)) for stage in split] == [7] * 8
    assert [len(stage.held) for stage in split] == [4] * 8
    for half in (0, 1):
        assert [index for stage in split for index in stage.of(half)] == list(range(28))


@pytest.mark.parametrize(("costs", "stages"), [([1.0] * 24, 8), ([1.0] * 38, 8), ([5, 1, 1, 1, 1, 1], 2), ([2.0], 1)])
def test_where_halves_make_no_stage_cheaper_they_share_its_blocks(costs: list[float], stages: int) -> None:
    """24 divide by 8; 38 do not, but a stage would still run 10 for both halves; the last has one dear block."""
    assert split_costs(costs, stages, halved=True) == split_costs(costs, stages)


def test_stages_of_halves_are_for_guided_batches_that_stream_alone() -> None:
    def halved(name: str, **layout: Any) -> bool:
        model = tiny.pipeline(name, blocks=3).transformer
        split = split_blocks(model, plan_for(model), ParallelConfig(pipefusion=2, **layout))
        return any(stage.halves for stage in split)

    assert halved("pixart")
    assert halved("sd3", tensor=2)
    assert not halved("flux")  # its guidance is a second call
    assert not halved("pixart", cfg=2)  # each branch has ranks of its own
    assert not halved("pixart", warmup="all")  # which runs whole batches
    assert not halved("pixart", stage_blocks=(2, 1))


@pytest.mark.parametrize(("blocks", "stages", "patches"), [(57, 8, 8), (57, 8, 16), (60, 8, 10), (30, 4, 6), (5, 3, 9)])
def test_shared_blocks_even_out_stages(blocks: int, stages: int, patches: int) -> None:
    """Every stage runs the same, but for the patches that do not divide, and holds a block or two more."""
    split = split_costs([1.0] * blocks, stages, shared=None)
    work = [sum(len(stage.of(patch, patches)) for patch in range(patches)) for stage in split]
    assert sum(work) == blocks * patches
    assert max(work) <= patches * blocks / stages + 1
    assert max(len(stage.held) for stage in split) <= blocks // stages + 2
    assert all(stage.of(patch, patches) for stage in split for patch in range(patches))


@pytest.mark.parametrize(("costs", "stages"), [([1.0] * 56, 8), ([1.0] * 57, 2), ([9, 1, 1, 1], 2), ([1.0] * 4, 4)])
def test_blocks_are_not_shared_for_nothing(costs: list[float], stages: int) -> None:
    """56 divide by 8; of 57 the half is hardly less than 29; one dear block is more than its half of the cost."""
    assert split_costs(costs, stages, shared=None) == split_costs(costs, stages)


def test_blocks_are_shared_where_patches_stream_beside_stale_keys() -> None:
    def shared(name: str, **layout: Any) -> tuple[int, ...]:
        model = tiny.pipeline(name).transformer  # of four blocks
        return shared_blocks(split_blocks(model, plan_for(model), ParallelConfig(**{"pipefusion": 3, **layout})))

    assert shared("qwen") == (1, 2)
    assert shared("qwen", share_blocks=False) == ()
    assert shared("qwen", warmup="all") == ()
    assert shared("qwen", warmup=0) == ()  # without a synchronous step no stage would know the others' keys
    assert shared("qwen", patches=1) == ()
    assert shared("qwen", stage_blocks=(2, 1, 1)) == ()
    assert shared("qwen", stage_blocks=(1.5, 1, 1.5)) == (1, 2)
    assert shared("pixart", split_batch=True) == ()
    assert shared("pixart", share_blocks=True) == (1, 2)


def test_stages_can_be_told_as_numbers_of_blocks() -> None:
    for sizes in ((3, 4, 2), (2.25, 1.5, 5.25), (1.333, 1.334, 1.333)):
        assert sizes_of(stages_of(sizes)) == sizes
    split = split_costs([1.0] * 57, 8, shared=True)
    assert stages_of(sizes_of(split)) == split
    assert stages_of((1.5, 2.5))[0].of(0, 4) == range(2)
    assert stages_of((1.5, 2.5))[0].of(2, 4) == range(1)


def test_layouts_that_do_not_fit_the_model_are_refused() -> None:
    model = tiny.pipeline("sd3").transformer
    plan = plan_for(model)
    with pytest.raises(ValueError, match=r"pipefusion=5 is more stages than the 4 blocks of SD3.*use pipefusion=4"):
        split_blocks(model, plan, ParallelConfig(pipefusion=5))
    with pytest.raises(ValueError, match=r"stage_blocks=\(2, 3\) adds up to 5 but .* has 4 blocks"):
        split_blocks(model, plan, ParallelConfig(pipefusion=2, stage_blocks=(2, 3)))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_configuration_files_alone_refuse_a_layout_that_cannot_fit(name: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path)
    check_folder(folder, ParallelConfig(pipefusion=4))
    with pytest.raises(ValueError, match=r"pipefusion=5 is more stages than the 4 blocks .* use pipefusion=4 or fewer"):
        check_folder(folder, ParallelConfig(pipefusion=5))
    with pytest.raises(ValueError, match="adds up to 5"):
        check_folder(folder, ParallelConfig(pipefusion=2, stage_blocks=(2, 3)))
    with pytest.raises(ValueError, match="tensor=5 does not divide"):
        check_folder(folder, ParallelConfig(tensor=5))


def test_a_hop_weighs_more_in_smaller_stages_of_narrower_models() -> None:
    flux, pixart = tiny.pipeline("flux").transformer, tiny.pipeline("pixart").transformer  # 32 and 48 channels

    def share(model: torch.nn.Module, backend: str = "nccl", **layout: int) -> float:
        return patch_costs(plan_for(model).width(model), 4, ParallelConfig(**layout), backend).hop

    # 2 bytes a channel at 4,500 operations a byte, beside 24 operations a channel² in each of the stage's two blocks
    assert share(flux, pipefusion=2) == pytest.approx(2 * 4500 / (24 * 32 * 2))
    assert share(flux, pipefusion=4) == pytest.approx(2 * share(flux, pipefusion=2))
    assert share(flux, pipefusion=2) == pytest.approx(1.5 * share(pixart, pipefusion=2))
    assert share(flux, "gloo", pipefusion=2) < share(flux, pipefusion=2)
    assert share(flux) == 0
