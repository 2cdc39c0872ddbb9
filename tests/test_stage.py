"""A stage: the class's own forward on one patch, and nothing of it left afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from patchpipe.stage.positions import PositionTable
from torch import nn

from patchpipe import ParallelConfig
from patchpipe.models import plan_for
from patchpipe.stage.balance import Boundary, StageBlocks, stages_of
from patchpipe.stage.patches import Cut
from patchpipe.stage.stage import CallContext, SharedStandIn, Stage, StandIn
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
    cut = Cut.of(plan.grid.rows(model, inputs["hidden_states"].shape, inputs), ParallelConfig(patches=2))
    sizes, streams = {1: (4,), 2: (1, 3), 4: (1, 1, 1, 1)}[stages], None
    result: Any = None
    for index in range(stages):
        first, last = index == 0, index == stages - 1
        stage = Stage(model, plan, stages_of(sizes)[index], first=first, last=last)
        stage.attach()
        try:
            context = CallContext(cut.whole, None, plan.text_rows(inputs), streams)
            result = stage.run(inputs, inputs["hidden_states"] if first else None, context)
        finally:
            stage.detach()
        streams = result
    return result


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_stages_one_after_the_other_are_the_model(name: str, stages: int) -> None:
    model = tiny.pipeline(name).transformer
    inputs = inputs_for(name, model)
    expected = model(**inputs, return_dict=False)[0]
    made = whole_call(model, plan_for(model), inputs, stages)
    assert torch.equal(made, expected)


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_a_stage_leaves_the_model_as_it_was(name: str, halves: bool) -> None:
    model = tiny.pipeline(name).transformer
    plan, modules = plan_for(model), dict(model.named_modules())
    before = {title: (id(module), sorted(module.__dict__), hooks(module)) for title, module in modules.items()}
    stage = Stage(model, plan, StageBlocks(Boundary(1, 0.5), Boundary(3, 0.5), halves), first=False, last=False)
    stage.attach()
    kinds = [type(model.get_submodule(place.name)) for place in plan.blocks_of(model)]
    assert (kinds[0], kinds[1], kinds[3]) == (StandIn, SharedStandIn, SharedStandIn)
    assert kinds[2] is type(plan.blocks_of(model)[2].block)
    stage.detach()
    after = {t: (id(m), sorted(m.__dict__), hooks(m)) for t, m in model.named_modules()}
    assert after == before


def hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


@pytest.mark.parametrize("latent", [(8, 6), (6, 12), (22, 6)])
@pytest.mark.parametrize("name", ["sd3", "pixart", "pixart-sigma"])
@torch.no_grad()
def test_a_patch_has_the_positions_it_has_in_the_whole(name: str, latent: tuple[int, int]) -> None:
    embed: Any = tiny.pipeline(name, dtype=torch.float64).transformer.pos_embed
    picture = torch.randn(1, 4, *latent, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, columns = latent[0] // 2, latent[1] // 2
    whole = embed(picture).unflatten(1, (rows, columns))
    table = PositionTable(embed)
    kept = {key: id(value) for key, value in {**vars(embed), **embed._buffers, **embed._modules}.items()}
    for start, stop in ((0, 1), (1, 3), (0, rows)):
        with table.showing(picture.shape, (start, stop)):
            part = embed(picture[:, :, 2 * start : 2 * stop])
        # A convolution may sum in another order for another height.
        torch.testing.assert_close(part.unflatten(1, (stop - start, columns)), whole[:, start:stop])
    assert {k: id(v) for k, v in {**vars(embed), **embed._buffers, **embed._modules}.items()} == kept
    assert torch.equal(embed(picture).unflatten(1, (rows, columns)), whole)


def test_a_stand_in_hands_streams_through_however_they_are_given() -> None:
    stand_in = StandIn(("text", "image"), {"image": 0, "text": 1})
    assert stand_in("image", text="text") == ("text", "image")
    assert stand_in("image", "text") == ("text", "image")
    assert StandIn(("image",), {"image": 0})("image") == "image"
