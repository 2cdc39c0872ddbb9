"""Skip-layer guidance: a call that leaves out blocks is a branch of guidance of its own, wherever the blocks stand."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import patchpipe
from patchpipe import OffloadConfig, ParallelConfig
from patchpipe.config import PASSES
from patchpipe.stage import compiling
from tests import tiny
from tests.pipeline.test_pipelines import attach
from tests.support.oracle import naive_pipefusion
from tests.support.parity import TOLERANCE, relative
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads

# Of four blocks: on two stages the second stage begins with block 2, on four every block is a stage.
BLOCKS = {
    "the first": [0],
    "the last": [3],
    "a stage's last": [1],
    "a stage's first": [2],
    "two in a row, of two stages": [1, 2],
    "the first and the last": [0, 3],
    "a whole stage": [2, 3],
    "all": [0, 1, 2, 3],
    "some that do not exist": [-1, 1, 9],
}
DURING = {"skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.7}  # the second and third of four steps
STREAM: dict[str, Any] = {"patch_rows": (1, 3), "warmup": 1, "forecast": False}


def setup_module() -> None:
    quieten()


def latents(pipe: Any, blocks: list[int] | None, **changes: Any) -> np.ndarray | None:
    wanted = tiny.call_arguments("sd35") | DURING | {"skip_guidance_layers": blocks} | changes
    output = pipe(**wanted, generator=torch.Generator().manual_seed(0), output_type="latent")
    return None if output is None else output.images.numpy()


def made() -> Any:
    return tiny.pipeline("sd35", dtype=torch.float64)


def painted(place: Place, blocks: list[int], call: dict[str, Any], **options: Any) -> tuple[np.ndarray | None, Any]:
    pipe = attach(made(), place, **{"split_batch": False, **options})
    return latents(pipe, blocks, **call), pipe.patchpipe.last


@pytest.mark.some(of=6)
@pytest.mark.parametrize("title", BLOCKS)
def test_blocks_that_a_call_leaves_out_hand_their_streams_through(title: str) -> None:
    """Bit-equal to diffusers where every step is synchronous; where patches stream, as one process and the oracle."""
    blocks = BLOCKS[title]
    plain = made()
    exact = latents(plain, blocks)
    assert not np.array_equal(exact, latents(plain, None)), "the guidance changes nothing: nothing was tested"
    alone = run_threads(1, partial(painted, **STREAM), blocks, {})[0][0]
    for stages in (2, 4):
        assert np.array_equal(run_threads(stages, painted, blocks, {})[0][0], exact)
        found, figures = run_threads(stages, partial(painted, **STREAM), blocks, {})[0]
        assert np.array_equal(found, alone)
        assert (figures.steps_synchronous, figures.steps_patched) == (2, 4)  # the branch has a warm-up step of its own
        assert figures.materialisations == 1  # at the end
    with naive_pipefusion(plain, (1, 3), 1):
        assert relative(alone, latents(plain, blocks)) < TOLERANCE
    assert relative(alone, exact) > TOLERANCE


# Layouts that only reorder sums, with schedules that begin with one of synchronous steps alone.
METHODS: tuple[dict[str, Any], ...] = (
    {"ulysses": 2}, {"ring": 2}, {"tensor": 2}, {"cfg": 2}, {"data": 2}, {"distrifusion": 2},
)  # fmt: skip


@pytest.mark.some(of=2)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_other_methods_leave_out_the_same_blocks(method: dict[str, Any]) -> None:
    """Synchronous as diffusers, and streaming as one process does; distrifusion has other stale rows than patches."""
    plain = made()
    exact, schedule = latents(plain, [0, 2]), {**STREAM, "patch_rows": (2, 2)}
    assert relative(run_threads(2, partial(painted, pipefusion=1, **method), [0, 2], {})[0][0], exact) < TOLERANCE
    if "distrifusion" in method:
        found = run_threads(2, partial(painted, pipefusion=1, warmup=1, **method), [0, 2], {})[0][0]
        assert TOLERANCE < relative(found, exact) < 1
        return
    alone = run_threads(1, partial(painted, **schedule), [0, 2], {})[0][0]
    found = run_threads(4, partial(painted, pipefusion=2, **schedule, **method), [0, 2], {})[0][0]
    assert relative(found, alone) < TOLERANCE


PICTURES = {"num_images_per_prompt": 3}  # calls of six entries and of three
TWO_PICTURES = {"num_images_per_prompt": 2}


@pytest.mark.some(of=2, first=1)
@pytest.mark.parametrize(
    ("method", "call"),
    [
        ({"cfg": 2}, PICTURES),  # the ranks of one branch run the call
        ({"cfg": 2}, TWO_PICTURES),  # each a half of it
        ({"data": 4}, PICTURES),  # there is nothing for the last rank
        ({"cfg": 2, "data": 2}, PICTURES),
        ({"pipefusion": 2, "split_batch": True}, PICTURES),
        ({"pipefusion": 2, "split_batch": True}, TWO_PICTURES),
    ],
    ids=str,
)
def test_a_call_of_one_branch_is_shared_as_it_can_be(method: dict[str, Any], call: dict[str, Any]) -> None:
    ranks = {"cfg": 2, "data": 2}, {"data": 4}
    world_size = 4 if method in ranks else 2
    given = {"pipefusion": 1, **method}
    exact = latents(made(), [1], **call)
    assert relative(run_threads(world_size, partial(painted, **given), [1], call)[0][0], exact) < TOLERANCE
    alone = run_threads(1, partial(painted, **STREAM), [1], call)[0][0]
    assert relative(run_threads(world_size, partial(painted, **STREAM, **given), [1], call)[0][0], alone) < TOLERANCE


# Beside one synchronous step; blocks that two stages share, whose keys go between them where they run.
SCHEDULES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "a shared block is left out": ({"stage_blocks": (1.5, 2.5)}, [1]),
    "another one is": ({"stage_blocks": (1.5, 2.5)}, [2]),
    "shared, with synchronous steps alone": ({"stage_blocks": (1.5, 2.5), "warmup": 4}, [1]),
    "text over two patches": ({"text_patches": 2}, [0, 3]),
    "a warm-up that streams": ({"warmup": "streamed", "patch_rows": (2, 2)}, [0, 3]),
    "a forecast": ({"forecast": True, "warmup": None}, [0, 3]),
    "a watched warm-up": ({"forecast": True, "warmup": "auto"}, [0, 3]),
}


@pytest.mark.some(of=2)
@pytest.mark.parametrize("title", SCHEDULES)
def test_other_schedules_stream_as_they_should(title: str) -> None:
    options, blocks = SCHEDULES[title]
    options = STREAM | options
    alone = {key: value for key, value in options.items() if key != "stage_blocks"}
    found = run_threads(2, partial(painted, **options), blocks, {})[0][0]
    assert np.array_equal(found, run_threads(1, partial(painted, **alone), blocks, {})[0][0])
    if options["warmup"] == "auto":
        return
    plain, streamed = made(), PASSES[True] if options["warmup"] == "streamed" else ()
    warmup = {"streamed": 0, None: 2}.get(options["warmup"], options["warmup"])
    told = {"streamed": streamed, "forecast": options["forecast"], "text_patches": options.get("text_patches", 1)}
    with naive_pipefusion(plain, options["patch_rows"], warmup, **told):
        assert relative(found, latents(plain, blocks)) < TOLERANCE


@pytest.mark.extra
def test_weights_that_come_and_go_and_compiled_blocks() -> None:
    """The blocks are called all the same, so their weights come in turn; compiled ones are not run."""
    stays = run_threads(2, partial(painted, **STREAM), [1, 3], {})[0][0]
    goes = OffloadConfig(resident=0.4, chunk=0.004, depth=3, gate="on")
    assert np.array_equal(run_threads(2, partial(painted, offload=goes, **STREAM), [1, 3], {})[0][0], stays)
    alone, pipe = run_threads(1, partial(painted, **STREAM), [1, 3], {})[0][0], made()
    with mock.patch.object(compiling, "BACKEND", "eager"):  # all of compiling but the kernels
        patchpipe.parallelize(pipe, ParallelConfig(compile=True, split_batch=False, **STREAM))
        assert relative(latents(pipe, [1, 3]), alone) < TOLERANCE


def own_loop(pipe: Any) -> torch.Tensor:
    """Three steps of a loop of one's own: one prompt, whole and with blocks left out, first one and then the other."""
    draw = torch.Generator().manual_seed(0)
    latent, text, pooled = (
        torch.randn(shape, dtype=torch.float64, generator=draw) for shape in ((1, 4, 8, 6), (1, 16, 32), (1, 32))
    )
    for step in range(3):
        predictions = [
            pipe.transformer(
                latent, text, pooled, torch.tensor([900.0 - 300 * step]), skip_layers=blocks, return_dict=False
            )[0]
            for blocks in ([None, [1], [2]], [[2], None, [1]], [[1], [2], None])[step]
        ]
        latent = latent - 0.1 * sum(predictions[1:], start=predictions[0])
    return latent + 0


def test_calls_that_leave_out_other_blocks_are_other_branches() -> None:
    """Whatever their order on one latent, and though their prompt is the same."""
    pipe = made()
    with naive_pipefusion(pipe, (1, 3), 1), torch.no_grad():
        expected = own_loop(pipe)
    patchpipe.parallelize(pipe, ParallelConfig(**STREAM))
    with pipe.patchpipe.serving():
        found = own_loop(pipe)
    assert relative(found.numpy(), expected.numpy()) < TOLERANCE
