"""Every plan against the class that the installed diffusers has, and what is said where that has changed.

``make oldest`` runs it with the oldest diffusers that the package allows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.errors import UnsupportedModel
from patchpipe.models import PLANS, plan_for, transformers_of
from patchpipe.models.relies import TESTED, check_relied_on
from tests import tiny

REPO = Path(__file__).parents[2]


def test_every_class_is_as_its_plan_has_it() -> None:
    seen = set()
    for name in tiny._build():
        for model in transformers_of(tiny.pipeline(name)).values():
            check_relied_on(plan_for(model), model)
            seen.add(type(model).__name__)
    assert {plan.model for plan in PLANS} <= seen


def renamed_list(model: Any) -> None:
    model.blocks = model.transformer_blocks
    del model.transformer_blocks


def renamed_attention(model: Any) -> None:
    block = model.transformer_blocks[1]
    block.mixer = block.attn
    del block.attn


def more_attention(model: Any) -> None:
    block = model.single_transformer_blocks[0]
    block.attn2 = type(block.attn)(query_dim=8, heads=1, dim_head=8)


def lost_argument(model: Any) -> None:
    block = model.transformer_blocks[0]

    def forward(self: nn.Module, hidden_states: torch.Tensor, context: torch.Tensor, temb: torch.Tensor) -> Any: ...

    block.__class__ = type("FluxTransformerBlock", (type(block),), {"forward": forward})


def lost_input(model: Any) -> None:
    def forward(self: nn.Module, hidden_states: torch.Tensor, prompt: torch.Tensor, timestep: torch.Tensor) -> Any: ...

    model.__class__ = type("FluxTransformer2DModel", (type(model),), {"forward": forward})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (renamed_list, "it has no list of blocks transformer_blocks. Plans are tested with diffusers"),
        (
            renamed_attention,
            "its FluxTransformerBlock has no layer attn; its FluxTransformerBlock has an attention la",
        ),
        (more_attention, "its FluxSingleTransformerBlock has an attention layer attn2"),
        (
            lost_argument,
            "its FluxTransformerBlock takes no encoder_hidden_states; its FluxTransformerBlock takes",
        ),
        (lost_input, "its forward takes no encoder_hidden_states; its forward takes no "),
    ],
)
def test_what_has_changed_is_told_when_a_pipeline_is_made_parallel(change: Callable[[Any], None], told: str) -> None:
    pipe = tiny.pipeline("flux")
    change(pipe.transformer)
    start = f"FluxTransformer2DModel of diffusers {diffusers.__version__} is not as the plan of"
    with pytest.raises(UnsupportedModel, match=re.escape(start) + ".*: .*" + re.escape(told)):
        patchpipe.parallelize(pipe, ParallelConfig(patches=2))


def test_it_is_told_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save("flux", tmp_path / "flux")
    init = diffusers.FluxTransformer2DModel.__init__

    def changed(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        renamed_list(self)

    monkeypatch.setattr(diffusers.FluxTransformer2DModel, "__init__", changed)
    with pytest.raises(UnsupportedModel, match="it has no list of blocks transformer_blocks"):
        patchpipe.from_pretrained(folder, ParallelConfig(patches=2))


def test_the_versions_that_are_told_are_those_that_are_tested() -> None:
    lowest = re.search(r'"diffusers>=([\d.]+)"', (REPO / "pyproject.toml").read_text(encoding="utf-8"))
    newest = re.search(r"^diffusers==([\d.]+)$", (REPO / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert lowest is not None
    assert newest is not None
    assert (f"{lowest[1]}.0", newest[1]) == TESTED
