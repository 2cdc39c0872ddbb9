"""Changes in eight bits in the place of tensors: what both sides make of them, bytes, and where it is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import patchpipe
from bench.lossy import decibels, paint, pipelines
from patchpipe import ParallelConfig
from patchpipe.demo import held_out
from patchpipe.models import plan_for
from patchpipe.parallel.lossy.residuals import Residuals, packed_bytes
from patchpipe.parallel.refusals import check_special
from tests import tiny
from tests.support import parity
from tests.support.nccl_rules import over
from tests.support.ranks import Place, run_ranks
from tests.support.threads import run_threads


def told(steps: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """What the other side makes of each, and the bytes sent."""
    here, there = Residuals(), Residuals()
    made, sent = [], []
    for rows in steps:
        shape, dtype = there.sent_as("rows", rows.shape, rows.dtype)
        packed = here.pack("rows", rows)
        assert (packed.shape, packed.dtype) == (torch.Size(shape), dtype)
        made.append(there.unpack("rows", packed.clone(), rows.shape, rows.dtype))
        sent.append(packed.nbytes)
        assert torch.equal(here._known["rows"], there._known["rows"])
    return made, sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_both_sides_hold_the_same_and_errors_do_not_pile_up(dtype: torch.dtype) -> None:
    """Of slow changes every one is told to half a step of its row, however many there have been."""
    generator = torch.Generator().manual_seed(0)
    start, way = torch.randn(2, 3, 5, 64, generator=generator, dtype=torch.float64)
    steps = [(start + 0.05 * number * way).to(dtype) for number in range(30)]
    made, sent = told(steps)
    assert torch.equal(made[0], steps[0])
    rounding = torch.finfo(dtype).eps * 8
    for before, step, other in zip(made, steps[1:], made[1:], strict=False):
        largest = (step.double() - before.double()).abs().amax(-1, keepdim=True)
        assert bool(((step.double() - other.double()).abs() <= largest / 254 * 1.01 + rounding).all())
    errors = [float((step.double() - other.double()).abs().max()) for step, other in zip(steps, made, strict=True)]
    assert max(errors[20:]) <= 1.2 * max(errors[1:11]) + rounding
    assert sent[1:] == [packed_bytes(start.shape, dtype)] * 29 == [15 * (64 + max(4, dtype.itemsize))] * 29


def test_rows_that_stay_and_other_shapes() -> None:
    rows = torch.randn(2, 4, 8)
    made, _ = told([rows, rows, torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)])
    assert torch.equal(made[1], rows)
    assert torch.equal(made[2], torch.zeros(2, 3, 8))
    known = Residuals()
    known.keep("whole", rows)
    known.keep("numbers", torch.ones(2, dtype=torch.int64))
    assert known.bytes == rows.nbytes
    assert not known.knows("whole", (2, 4, 8), torch.bfloat16)
    known.forget(lambda key: key == "whole")
    known.move(torch.device("cpu"))
    assert known.bytes == 0


# -- requests ------------------------------------------------------------------------------------


def painted(place: Place, name: str, layouts: list[dict[str, Any]], steps: int) -> list[tuple[Any, int]]:
    pipe, found = tiny.pipeline(name), []
    call = {**tiny.call_arguments(name, height=128), "num_inference_steps": steps}
    for layout in layouts:
        config = ParallelConfig(**layout)
        group = place.join(config)
        patchpipe.parallelize(pipe, config, group=group)
        made = parity.call_pipeline(pipe, call)
        again = parity.call_pipeline(pipe, call)  # a request leaves nothing behind
        if made is not None:
            np.testing.assert_array_equal(tiny.painted(made), tiny.painted(again))
        lines = group.lines.get("displaced")
        sent = pipe.patchpipe.last.sent_bytes if lines is None else lines.sent_bytes // 2
        found.append((None if made is None else np.asarray(tiny.painted(made)), sent))
        patchpipe.restore(pipe)
    return found


LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("flux", {"pipefusion": 2, "patches": 4}),
    ("sd3", {"pipefusion": 2, "patches": 3, "split_batch": True, "forecast": True}),
    ("pixart-4", {"pipefusion": 4, "patches": 4}),
    ("sd3", {"cfg": 2, "pipefusion": 2, "patches": 3}),
    ("flux", {"distrifusion": 2}),
    ("qwen-padded", {"distrifusion": 2, "forecast": True}),
    ("sd3", {"data": 2, "distrifusion": 2}),
]


@pytest.mark.some(of=4)
@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=str)
def test_a_picture_is_nearly_the_same(name: str, layout: dict[str, Any]) -> None:
    """To a small part of its numbers, though random tiny models move far in a step; under NCCL's rules too."""
    layouts = [{**layout, "warmup": 1}, {**layout, "warmup": 1, "compress": "int8"}]
    with over("nccl"):
        (right, whole), (found, less) = run_threads(ParallelConfig(**layout).world_size, painted, name, layouts, 5)[0]
    assert right is not None
    assert not np.array_equal(right, found)
    assert np.linalg.norm(found - right) < 0.05 * np.linalg.norm(right)
    assert less < whole


@pytest.mark.extra
def test_processes_paint_what_threads_do() -> None:
    layouts = [{"pipefusion": 2, "patches": 4, "compress": "int8"}, {"distrifusion": 2, "compress": "int8"}]
    threads, processes = (run(2, painted, "flux", layouts, 4)[0] for run in (run_threads, run_ranks))
    assert all(np.array_equal(one[0], other[0]) for one, other in zip(threads, processes, strict=True))


@pytest.mark.parametrize("layout", [{"pipefusion": 2, "patches": 4}, {"distrifusion": 2}], ids=str)
def test_bytes_are_those_of_the_formula(layout: dict[str, Any]) -> None:
    """A step's bytes shrink to an element each and a scale a row; the first step of patches has nothing to add to."""
    layouts = [{**layout, "warmup": 1, "compress": how} for how in (None, "int8")]
    steps, item = 6, 4
    by_rank = run_threads(2, painted, "flux", layouts, steps)
    whole, less = (sum(rank[at][1] for rank in by_rank) for at in (0, 1))
    elements = (8 * 3 + 40) * 2 * 16  # tokens of picture and text, heads, channels
    if "distrifusion" in layout:
        elements *= 2 * 4  # keys and values, layers
        assert whole == steps * elements * item
        assert less == elements * item + (steps - 1) * (elements + elements // 16 * item)
    else:
        assert by_rank[0][0][1] == steps * elements * item
        assert by_rank[0][1][1] == 2 * elements * item + (steps - 2) * (elements + elements // 32 * item)
        assert by_rank[1][0][1] == by_rank[1][1][1]  # predictions go as they are


# -- quality -------------------------------------------------------------------------------------


@pytest.mark.extra
def test_the_bundled_model_paints_as_well_as_without() -> None:
    pipes, prompts = pipelines(2), held_out()[:1]
    [(right, _, _)] = paint(None, pipes, prompts, 20, [{}])
    base = {"pipefusion": 2, "patches": 4, "forecast": True}
    (plain, _, _), (packed, _, _) = run_threads(2, paint, pipes, prompts, 20, [base, {**base, "compress": "int8"}])[0]
    [one], [other] = decibels(right, plain), decibels(right, packed)
    assert other > min(one - 3, 40)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ({"pipefusion": 2, "compress": "int4"}, "compress='int4' is unknown"),
        ({"ulysses": 2}, "is for what goes from stage to stage"),
        ({"pipefusion": 2, "warmup": "all"}, "after the warm-up"),
        ({"pipefusion": 2, "ulysses": 2}, "not tested with ulysses and so refused"),
        ({"pipefusion": 2, "ring": 2}, "not tested with ring"),
        ({"pipefusion": 2, "tensor": 2}, "not tested with tensor"),
        ({"pipefusion": 2, "compile": True}, "not tested with compile"),
        ({"pipefusion": 2, "warmup": "streamed"}, "not tested with warmup='streamed'"),
    ],
)
def test_layouts_that_make_no_sense_are_refused(layout: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ParallelConfig(**{"compress": "int8", **layout})


def test_what_nothing_tests_is_refused() -> None:
    config = ParallelConfig(pipefusion=2, compress="int8")
    with pytest.raises(ValueError, match="compress='int8' has not been tested with"):
        check_special(plan_for(tiny.pipeline("mochi").transformer), config)
    assert "changes in int8" in config.describe()
    assert ParallelConfig(**config.as_dict()) == config
