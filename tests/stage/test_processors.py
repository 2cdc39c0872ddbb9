"""Processors whose code attends through the store by other names; where that does not do, all they call is watched."""

from __future__ import annotations

from types import FunctionType
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.transformers import transformer_flux
from torch import Tensor
from torch.nn import functional

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.stage import attention
from patchpipe.stage.attention import Attended
from tests import tiny

LAYOUT = ParallelConfig(patches=2, warmup=1)


def paint(pipe: Any, name: str) -> Tensor:
    arguments = tiny.call_arguments(name, guided=False, steps=4)
    return tiny.painted(pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent"))


def hooks_of(pipe: Any) -> list[Attended]:
    hooks = [module.__dict__.get("forward") for module in pipe.transformer.modules()]
    return [hook for hook in hooks if isinstance(hook, Attended)]


def watched(pipe: Any, name: str) -> tuple[Tensor, int]:
    """A picture, and how many layers' calls were watched whole."""
    count, enter = [], attention._StoreMode.__enter__

    def entered(mode: Any) -> Any:
        count.append(mode)
        return enter(mode)

    with mock.patch.object(attention._StoreMode, "__enter__", entered):
        return paint(pipe, name), len(count)


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart", "qwen"])
def test_the_picture_is_that_of_layers_that_are_watched_whole(name: str) -> None:
    """Of a processor that calls torch's function itself nothing is; of others what diffusers' own does around it."""
    pipe = tiny.pipeline(name)
    kinds = {type(processor) for processor in pipe.transformer.attn_processors.values()}
    patchpipe.parallelize(pipe, LAYOUT)
    quick = paint(pipe, name)
    assert not any(hook.hidden for hook in hooks_of(pipe))
    for hook in hooks_of(pipe):
        hook.hidden = True
    slow, count = watched(pipe, name)
    assert torch.equal(quick, slow)
    assert count > 0
    assert {type(processor) for processor in pipe.transformer.attn_processors.values()} == kinds


def test_diffusers_own_functions_stay_as_they_are() -> None:
    before = attention_dispatch.dispatch_attention_fn, functional.scaled_dot_product_attention
    call = transformer_flux.FluxAttnProcessor.__call__
    pipe, plain = patchpipe.parallelize(tiny.pipeline("flux"), LAYOUT), tiny.pipeline("flux")
    assert isinstance(call, FunctionType)
    assert transformer_flux.FluxAttnProcessor.__call__ is call
    assert transformer_flux.dispatch_attention_fn is before[0]
    alone = paint(plain, "flux")
    paint(pipe, "flux")
    assert torch.equal(paint(plain, "flux"), alone), "a plain pipeline beside it"
    assert (attention_dispatch.dispatch_attention_fn, functional.scaled_dot_product_attention) == before


class Within:
    """Attends in a function of its own, so that its code names nothing of it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return transformer_flux.FluxAttnProcessor()(*args, **kwargs)


class Named:
    """Names the function, and leaves attention to another all the same."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None,
        image_rotary_emb: Any = None, never: bool = False,
    ) -> Any:  # fmt: skip
        if never:
            return functional.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states)
        return Within()(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


@pytest.mark.parametrize("processor", [Within, Named])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_users_own_processor_is_watched_whole(processor: type, late: bool) -> None:
    right = paint(patchpipe.parallelize(tiny.pipeline("flux"), LAYOUT), "flux")
    pipe = tiny.pipeline("flux")
    if not late:
        pipe.transformer.set_attn_processor(processor())
    patchpipe.parallelize(pipe, LAYOUT)
    if late:
        pipe.transformer.set_attn_processor(processor())
    found, count = watched(pipe, "flux")
    assert torch.equal(found, right)
    assert count > 0
    assert any(hook.hidden for hook in hooks_of(pipe)) == (processor is Named)


def test_rows_that_there_are_none_of_are_reshaped_under_the_mode() -> None:
    """Qwen-Image turns text rows by themselves: of patches without any, torch cannot tell a size."""
    pipe = patchpipe.parallelize(tiny.pipeline("qwen"), LAYOUT)
    paint(pipe, "qwen")
    assert any(hook.reshapes for hook in hooks_of(pipe))
