"""What goes with every family: several pictures on ranks of their own, weights that come and go, and LoRA."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn

import patchpipe
from patchpipe import OffloadConfig, ParallelConfig
from patchpipe.models import plan_for
from tests import tiny
from tests.support.nccl_rules import over
from tests.support.parity import _cast, call_pipeline, relative
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads
from tests.tiny import images as tiny_images
from tests.tiny import video as tiny_video

TWICE = (  # classes that another one stands for
    *("flux-kontext", "flux2-edit", "flux2-dev", "qwen-edit", "qwen-edit-plus", "kandinsky5-picture", "hunyuan-i2v"),
    *("hunyuan-replace", "cogvideox-1.5", "cogvideox-i2v", "cosmos-2.5"),
)
NAMES = (
    *("sd35", "flux2", "zimage", "cogview4", "wan", "ltx"),
    *(name for name in (*tiny_images.BUILD, *tiny_video.BUILD) if name not in TWICE),
)
ALONE = ("wan-animate", "wan-vace", "helios", "framepack", "prx")  # one a call, in diffusers itself
PROMPTS = ("hunyuan-dit", "hunyuan-video15", "cogvideox", "consisid", "chronoedit", "ltx2", "allegro")
EACH = {"consisid": ("image",)}  # what diffusers wants one of for each prompt
FLOAT32 = 1e-3
OFFLOAD = OffloadConfig(resident=0.3, chunk=0.004, depth=2)
RANKS: dict[str, Any] = {"warmup": "all", "offload": OFFLOAD}


def setup_module() -> None:
    quieten()


def _doubled(given: Any) -> Any:
    """A prompt, its embeddings or their mask, for two pictures."""
    return torch.cat([given, given]) if isinstance(given, torch.Tensor) else [given, given]


def several(pipe: Any, name: str) -> dict[str, Any]:
    """A call for two pictures."""
    known = inspect.signature(pipe.__call__).parameters
    arguments = tiny.call_arguments(name)
    arguments["num_inference_steps"] = min(2, arguments.get("num_inference_steps", 2))
    if name in ALONE:
        return arguments
    if name in PROMPTS:
        prompts = {
            key: _doubled(value) for key, value in arguments.items() if "prompt" in key or key in EACH.get(name, ())
        }
        return {**arguments, **prompts, "seeds": [3, 5]}
    for key in ("num_images_per_prompt", "num_videos_per_prompt"):
        if key in known:
            return {**arguments, key: 2, "seeds": [3, 5]}
    return {**arguments, "class_labels": [1, 2], "seeds": [3, 5]} if "class_labels" in known else arguments


def in_blocks(model: nn.Module) -> Callable[[nn.Module, str], bool]:
    """Whether a part is a Linear of a block."""
    lists = tuple(listing.path for listing in plan_for(model).blocks)
    return lambda part, path: path.startswith(lists) and type(part) is nn.Linear


def adapted(name: str) -> Any:
    """A tiny pipeline with LoRA beside the Linears of its attention, where its class takes any."""
    pipe = tiny.pipeline(name)
    model = pipe.transformer
    if hasattr(model, "add_adapter"):
        suits = in_blocks(model)
        found = [path for path, part in model.named_modules() if suits(part, path)]
        with tiny._BUILDING:
            torch.manual_seed(1)
            model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=found[:4], init_lora_weights=False))
    return pipe


def paint(place: Place | None, name: str, layout: dict[str, Any]) -> np.ndarray | None:
    pipe = adapted(name)
    if place is not None:
        config = ParallelConfig(**layout, timeout=60)
        patchpipe.parallelize(pipe, config, group=place.join(config))
    output = call_pipeline(tiny_images.settled(pipe), several(pipe, name))
    return None if output is None else np.asarray(tiny.painted(output))


@pytest.mark.some(of=4)
@pytest.mark.parametrize("name", NAMES)
def test_pictures_apart_with_lora_and_weights_that_come_and_go(name: str) -> None:
    """All at once: each would show alone. Batches of one and of two round otherwise, so not to the bit."""
    layout = {"pipefusion" if name in ALONE else "data": 2, **RANKS}
    with over("nccl"):
        found = run_threads(2, paint, name, layout)[0]
    assert found is not None
    error = relative(found, paint(None, name, {}))
    assert error <= FLOAT32, error


def together(place: Place | None, name: str) -> list[np.ndarray] | None:
    """Two pictures, with quantised weights: one after the other without ranks, in flight together on them."""
    pipe = tiny_images.settled(tiny.pipeline(name))
    if find_spec("torchao"):
        ao = import_module("torchao.quantization")
        ao.quantize_(pipe.transformer, ao.Int8WeightOnlyConfig(), filter_fn=in_blocks(pipe.transformer))
    arguments = {**tiny.call_arguments(name), "output_type": "latent"}
    arguments = {key: _cast(value, torch.float32) for key, value in arguments.items()}
    arguments["num_inference_steps"] = min(2, arguments.get("num_inference_steps", 2))
    calls = [{**arguments, "generator": torch.Generator().manual_seed(seed)} for seed in (3, 5)]
    if place is None:
        return [np.asarray(tiny.painted(pipe(**call))) for call in calls]
    config = ParallelConfig(pipefusion=2, warmup="all", timeout=60)
    made = patchpipe.parallelize(pipe, config, group=place.join(config)).patchpipe.together(calls)
    return None if made[0] is None else [np.asarray(tiny.painted(each)) for each in made]


@pytest.mark.some(of=4, first=1)
@pytest.mark.parametrize("name", NAMES)
def test_requests_in_flight_together_with_quantised_weights(name: str) -> None:
    """To the bit; with whole weights where torchao is not installed."""
    found, expected = run_threads(2, together, name)[0], together(None, name)
    assert all(map(np.array_equal, found, expected or ()))
    assert not np.array_equal(*found)
