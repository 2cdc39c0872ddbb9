"""Compiled blocks paint what eager ones paint, with a handful of graphs for patches of every shape."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.layout.combinations import COMPILED
from patchpipe.stage import compiling
from tests import tiny
from tests.support.parity import TOLERANCE, pinned, relative
from tests.support.ranks import Place, run_ranks

HEIGHT = 112  # 7 rows of tokens
FLOAT32 = 1e-5


def paint(pipe: Any, name: str, **call: Any) -> Any:
    arguments = {**tiny.call_arguments(name, height=HEIGHT), **call}
    output = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent")
    return None if output is None else output.images.numpy()


def traced(backend: str) -> Any:
    """All of compiling but the kernels, which take long."""
    return mock.patch.object(compiling, "BACKEND", backend)


GRAPHS: tuple[tuple[str, dict[str, int]], ...] = (
    ("flux", {"FluxTransformerBlock": 2, "FluxSingleTransformerBlock": 2}),
    ("sd3", {"JointTransformerBlock": 3, "JointTransformerBlock_2": 3}),
    ("qwen-padded", {"QwenImageTransformerBlock": 3}),
)
KERNELS = "pixart"


@pytest.mark.extra
@pytest.mark.parametrize(("name", "graphs"), GRAPHS)
def test_graphs_are_few_and_paint_the_same(name: str, graphs: dict[str, int]) -> None:
    """One with text rows and one without; batches of two warm up one entry at a time, and stream whole."""
    requests = [{"num_inference_steps": 2}, {"height": 144, "width": 80, "num_inference_steps": 2}]
    pipe, found = tiny.pipeline(name, blocks=2), {}
    for compiled in (False, True):
        with traced("eager"):
            patchpipe.parallelize(pipe, ParallelConfig(patches=4, warmup=1, compile=compiled))
            found[compiled] = [paint(pipe, name, **request) for request in requests]
            counted = dict(pipe.patchpipe.graphs)
            patchpipe.restore(pipe)
    errors = [relative(*pair) for pair in zip(found[True], found[False], strict=True)]
    assert max(errors) <= FLOAT32, errors
    assert counted == graphs


def test_restore_takes_the_compiled_blocks_off_again() -> None:
    pipe = tiny.pipeline("flux", blocks=2)
    before = paint(pipe, "flux")
    patchpipe.parallelize(pipe, ParallelConfig(patches=2, compile=True))
    patchpipe.restore(pipe)
    assert (paint(pipe, "flux") == before).all()
    assert not [name for name, module in pipe.transformer.named_modules() if "forward" in module.__dict__]


def test_kernels_paint_the_same_whatever_the_stages() -> None:
    """Law 2 for compiled blocks, and law 1 within float tolerance."""
    eager, alone = by_layout(Place(0, 1, None), KERNELS, [{}, {"compile": True}], "inductor")
    [two] = run_ranks(2, by_layout, KERNELS, [{"pipefusion": 2, "compile": True}], "inductor")[0]
    assert 0 < relative(alone["latents"], eager["latents"]) <= FLOAT32
    assert (two["latents"] == alone["latents"]).all()
    assert two["graphs"] == alone["graphs"] == {"BasicTransformerBlock": 1}


@pytest.mark.some(of=2)
@pytest.mark.parametrize("count", [1, 2])
def test_law_6_compiled_layouts_are_tested(count: int) -> None:
    assert {len(methods) for methods in COMPILED} == {1, 2}
    layouts = [dict.fromkeys(sorted(methods), 2) for methods in COMPILED if len(methods) == count]
    both = [{**layout, "compile": compiled} for layout in layouts for compiled in (False, True)]
    found = run_ranks(2**count, by_layout, "flux", both, "eager", True)
    for at, layout in enumerate(layouts):
        eager, compiled = found[0][2 * at], found[0][2 * at + 1]
        assert relative(compiled["latents"], eager["latents"]) <= TOLERANCE, layout
        graphs = [rank[2 * at + 1]["graphs"] for rank in found]
        assert all(1 <= number <= 3 for each in graphs for number in each.values()), (layout, graphs)


@pytest.mark.extra
def test_stages_of_halves_are_compiled_too() -> None:
    """Three blocks on two stages, of which each runs the middle one for a branch of guidance."""
    layouts = [{"pipefusion": 2, "compile": compiled} for compiled in (False, True)]
    eager, compiled = run_ranks(2, by_layout, "pixart", layouts, "eager", True, 3, True)[0]
    assert relative(compiled["latents"], eager["latents"]) <= TOLERANCE
    assert compiled["graphs"] == {"BasicTransformerBlock": 1}


@pytest.mark.extra
def test_blocks_that_stages_share_are_compiled_too() -> None:
    """Three blocks on two stages, of which each runs the middle one for some patches."""
    layouts = [{"pipefusion": 2, "share_blocks": True, "compile": compiled} for compiled in (False, True)]
    found = run_ranks(2, by_layout, "flux", layouts, "eager", True, 3, True)
    eager, compiled = found[0]
    assert relative(compiled["latents"], eager["latents"]) <= TOLERANCE
    assert all(1 <= number <= 3 for rank in found for number in rank[1]["graphs"].values()), found


def by_layout(
    place: Place,
    name: str,
    layouts: list[dict[str, Any]],
    backend: str,
    double: bool = False,
    blocks: int = 2,
    guided: bool = False,
) -> list[dict[str, Any]]:
    """Latents and graphs of every layout on this rank."""
    pipe, found = tiny.pipeline(name, blocks=blocks, dtype=torch.float64 if double else torch.float32), []
    for layout in layouts:
        schedule = {"warmup": 1} if "distrifusion" in layout else pinned({"patches": 3}, HEIGHT // 16)
        config = ParallelConfig(**layout, **schedule, timeout=60)
        patchpipe.parallelize(pipe, config, group=place.join(config))
        with traced(backend):
            settings = {"guided": guided or "cfg" in layout, "height": HEIGHT, "steps": 3}
            latents = paint(pipe, name, **tiny.call_arguments(name, **settings))
        found.append({"latents": latents, "graphs": dict(pipe.patchpipe.graphs)})
        patchpipe.restore(pipe)
    return found


def test_what_is_not_tested_compiled_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compile=True is not tested with data .*: .* pipefusion|compile=False"):
        ParallelConfig(data=2, compile=True)
    with pytest.raises(ValueError, match="compile=1 must be True or False"):
        ParallelConfig(compile=1)  # type: ignore[arg-type]


def test_a_block_with_a_forward_of_its_own_is_refused() -> None:
    pipe = tiny.pipeline("pixart", blocks=2)
    block = pipe.transformer.transformer_blocks[1]
    block.forward = block.forward
    with pytest.raises(ValueError, match=r"forward of transformer_blocks\.1 has been replaced"):
        patchpipe.parallelize(pipe, ParallelConfig(patches=2, compile=True))
    assert [name for name, module in pipe.transformer.named_modules() if "forward" in module.__dict__] == [
        "transformer_blocks.1"
    ]
    paint(pipe, "pixart")


def test_too_many_shapes_go_on_uncompiled(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny.pipeline("pixart", blocks=1)
    patchpipe.parallelize(pipe, ParallelConfig(patches=2))
    expected = paint(pipe, "pixart")
    patchpipe.restore(pipe)
    patchpipe.parallelize(pipe, ParallelConfig(patches=2, compile=True))
    with traced("eager"), torch._dynamo.config.patch(recompile_limit=1):
        found = paint(pipe, "pixart")
    assert relative(found, expected) <= FLOAT32
    assert pipe.patchpipe.graphs == {"BasicTransformerBlock": 1}
    assert "runs uncompiled from now on" in caplog.text
