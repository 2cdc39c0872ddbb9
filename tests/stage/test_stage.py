"""A stage: the class's own forward on one patch, and nothing of it left afterwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from patchpipe import ParallelConfig
from patchpipe.layout.split import Boundary, StageBlocks, stages_of
from patchpipe.models import plan_for
from patchpipe.models.blocks import of
from patchpipe.models.latent import Raster
from patchpipe.stage.context import CallContext
from patchpipe.stage.patches import Cut, Patch
from patchpipe.stage.rows import Cutter, Rows
from patchpipe.stage.seam import Seam
from patchpipe.stage.stage import Stage
from tests import tiny

PIPELINES = ("flux", "flux-guided", "sd3", "sd35", "pixart", "pixart-sigma", "qwen")


def inputs_for(name: str, model: Any, rows: int = 4, columns: int = 3) -> dict[str, Any]:
    """The arguments of one call for a picture of a few rows of tokens."""
    make = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make)

    inputs: dict[str, Any] = {"timestep": torch.tensor([0.5]), "encoder_hidden_states": random(1, 8, 32)}
    if name.startswith("flux"):
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1] += torch.arange(rows)[:, None]
        ids[..., 2] += torch.arange(columns)[None]
        inputs |= {
            "hidden_states": random(1, rows * columns, 16), "img_ids": ids.reshape(-1, 3),
            "txt_ids": torch.zeros(8, 3), "pooled_projections": random(1, 16),
        }  # fmt: skip
        if name == "flux-guided":
            inputs["guidance"] = torch.tensor([3.5])
        return inputs
    if name == "qwen":
        mask = torch.tensor([[1] * 5 + [0] * 3])
        shapes = [[(1, rows, columns)]]
        return inputs | {
            "hidden_states": random(1, rows * columns, 16), "encoder_hidden_states_mask": mask, "img_shapes": shapes,
        }  # fmt: skip
    inputs |= {"hidden_states": random(1, 4, 2 * rows, 2 * columns), "timestep": torch.tensor([500])}
    if name.startswith("sd3"):
        return {**inputs, "pooled_projections": random(1, 32)}
    conditions = {"resolution": torch.tensor([[64.0, 48.0]]), "aspect_ratio": torch.tensor([[1.3]])}
    none = {"resolution": None, "aspect_ratio": None}
    return {**inputs, "added_cond_kwargs": conditions if name == "pixart" else none}


def whole_call(model: nn.Module, plan: Any, inputs: dict[str, Any], stages: int) -> torch.Tensor:
    """A synchronous call through several stages of one process, and the stages taken off again."""
    raster = plan.grid.rows(model, inputs["hidden_states"].shape, inputs)
    cut, sizes = Cut.of(raster, ParallelConfig(patches=2)), {1: (4,), 2: (1, 3), 4: (1, 1, 1, 1)}[stages]
    result: Any = {}
    for index in range(stages):
        first, last = index == 0, index == stages - 1
        stage = Stage(model, plan, stages_of(sizes)[index], first=first, last=last)
        stage.attach()
        stage.sew()
        try:
            context = CallContext(cut.whole, stage.look(inputs, raster, {}), None, result)
            result = stage.run(inputs, inputs["hidden_states"] if first else None, context)
        finally:
            stage.detach()
    return result


@pytest.mark.some
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_stages_one_after_the_other_are_the_model(name: str, stages: int) -> None:
    model = tiny.pipeline(name).transformer
    inputs = inputs_for(name, model)
    expected = model(**inputs, return_dict=False)[0]
    made = whole_call(model, plan_for(model), inputs, stages)
    assert torch.equal(made, expected)


@pytest.mark.some
@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_a_stage_leaves_the_model_as_it_was(name: str, halves: bool) -> None:
    model = tiny.pipeline(name).transformer
    plan, modules = plan_for(model), dict(model.named_modules())
    before = {title: (id(module), sorted(module.__dict__), hooks(module)) for title, module in modules.items()}
    stage = Stage(model, plan, StageBlocks(Boundary(1, 0.5), Boundary(3, 0.5), halves), first=False, last=False)
    stage.attach()
    stage.sew()
    assert all(isinstance(place.block.__dict__["forward"], Seam) for place in plan.blocks_of(model))
    stage.detach()
    after = {t: (id(m), sorted(m.__dict__), hooks(m)) for t, m in model.named_modules()}
    assert after == before


def hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


@pytest.mark.parametrize("outer", [1, 3])
@pytest.mark.parametrize("segments", [("image",), ("text", "image"), ("image", "text"), ("text", "image", "register")])
def test_rows_that_are_cut_out_and_put_back_are_those_of_the_whole(segments: tuple[str, ...], outer: int) -> None:
    """Patch by patch, and piece by piece of a patch that ranks share; a clip's rows lie apart in the model's order."""
    raster = Raster(count=5, tokens=2 * outer, units=2, outer=outer)
    sizes = {"image": raster.total, "text": 3, "register": 4}
    whole = torch.randn(2, sum(sizes[name] for name in segments), 3)
    cut, held = Cut.of(raster, ParallelConfig(patch_rows=(2, 3))), of(*segments)
    patches: list[Patch] = list(cut.patches)
    for pieces in (patches, [piece for patch in patches for piece in cut.split(patch, 2)], cut.split(cut.whole, 3)):
        cutters = [Cutter(piece, raster, sizes) for piece in pieces]
        parts = [cutter.narrow(whole, held) for cutter in cutters]
        assert torch.equal(sum(cutter.widen(part, held) for cutter, part in zip(cutters, parts, strict=True)), whole)
        rows = Rows.of(segments, sizes, raster)
        together = rows.join(parts, pieces, 1)
        assert torch.equal(together, rows.by_cut(whole, 1))
        assert all(torch.equal(one, two) for one, two in zip(rows.part(together, pieces, 1), parts, strict=True))


def test_only_arguments_with_rows_are_cut() -> None:
    raster = Raster(4, 2, 1)
    cutter = Cutter(Cut.of(raster, ParallelConfig(patches=2)).patches[1], raster, {"image": 8, "text": 3})
    image, text, alone = torch.randn(1, 8, 2), torch.randn(3, 2), torch.randn(1, 1, 2)
    cut = cutter.narrow((image, text), (of("image"), of("text", dim=0)))
    assert torch.equal(cut[0], image[:, 4:])
    assert cut[1].shape == (0, 2)
    assert cutter.narrow(alone, of("image")) is alone, "one row that stands for all"
    assert cutter.narrow(image, of("image", ndim=4)) is image
    with pytest.raises(RuntimeError, match=r"given 8 rows where 11 of text and image .* does not fit"):
        cutter.narrow(image, of("text", "image"))


def test_a_plan_that_does_not_fit_is_noticed_before_any_block_runs() -> None:
    model = tiny.pipeline("pixart").transformer
    plan, inputs = plan_for(model), inputs_for("pixart", model)
    wrong = replace(plan, blocks=(replace(plan.blocks[0], rows={"hidden_states": of("image", dim=2)}),))
    stage = Stage(model, wrong, stages_of((4,))[0], first=True, last=True)
    stage.attach()
    stage.sew()
    with pytest.raises(RuntimeError, match="hidden_states has 48 rows before transformer_blocks"):
        stage.look(inputs, plan.grid.rows(model, inputs["hidden_states"].shape, inputs), {})
