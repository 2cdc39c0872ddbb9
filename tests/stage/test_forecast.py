"""Stale keys and values shown where they will be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.demo import MODEL_DIR
from patchpipe.models.latent import Raster
from patchpipe.stage.keys.forecast import Clock, Pace, Trend
from patchpipe.stage.keys.store import LayerStore
from patchpipe.stage.patches import Cut
from patchpipe.stage.rows import Rows
from tests import tiny
from tests.support.nccl_rules import over
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads

STEPS = 16  # fine enough that tiny models' keys move in lines


def setup_module() -> None:
    quieten()


def paces(*times: float) -> list[tuple[float, float]]:
    clock = Clock()
    ticks = [clock.tick(torch.tensor([time, time])) for time in times]
    return [(float(pace.ahead), float(pace.again)) for pace in ticks]


# -- one layer -----------------------------------------------------------------------------------


def test_the_pace_is_that_of_the_noise_level() -> None:
    assert paces(1000, 900, 700, 600) == [(0, 0), (0, 0), (2, 0), (0.5, 0)]


def test_a_level_that_comes_twice_takes_no_step() -> None:
    """Second-order schedulers: two calls a step, the second at the level of the next step's first."""
    assert paces(1000, 900, 900, 800, 800) == [(0, 0), (0, 0), (0, 1), (1, 0), (0, 1)]


def test_no_step_is_taken_back_or_too_far() -> None:
    assert paces(1000, 990, 500, 600)[2:] == [(4, 0), (0, 0)]


def test_times_of_tokens_count_where_there_is_noise() -> None:
    clock = Clock()
    for level in (800.0, 600.0):
        clock.tick(torch.tensor([[0.0, level, level]]))
    assert float(clock.tick(torch.tensor([[0.0, 500.0, 500.0]])).ahead) == 0.5


def moving(step: int, noise: float = 0.0) -> Tensor:
    """Keys of 12 rows that move in a line, each at a speed of its own."""
    make = torch.Generator().manual_seed(1)
    start, speed = (torch.randn(2, 3, 12, 8, generator=make) for _ in range(2))
    fresh = torch.Generator().manual_seed(step)
    return start + step * speed + noise * torch.randn(2, 3, 12, 8, generator=fresh)


def store_after(steps: int, noise: float = 0.0, forecast: bool = True, **began: bool) -> tuple[LayerStore, Tensor]:
    """A store in which the first of three patches has come to a step, and what it shows."""
    raster, clock = Raster(3, 4, 4), Clock(**began)
    store, cut = LayerStore(Rows(("image",), (12,), raster)), Cut.of(raster, ParallelConfig(patches=3))
    shown = torch.empty(0)
    for step in range(steps + 1):
        rows = moving(step, noise)
        pace = clock.tick(torch.tensor([1000.0 - step])) if forecast else None
        for patch in [cut.whole] if step == 0 else cut.patches[:1] if step == steps else cut.patches:
            part = rows[:, :, slice(*patch.tokens)]
            both = part, part.clone()
            shown, *_ = store.keep(*both, pace=pace) if patch.whole else store.write(patch, *both, pace=pace)
    return store, shown


def test_rows_that_move_in_a_line_are_shown_where_they_will_be() -> None:
    _, shown = store_after(4)
    error = (shown - moving(4)).abs().amax((0, 1, 3))
    assert torch.equal(shown[:, :, :4], moving(4)[:, :, :4]), "the first patch's rows are fresh"
    assert error.max() < 0.05, "the others are forecast, up to what eight bits leave"
    _, stale = store_after(4, forecast=False)
    assert torch.equal(stale[:, :, 4:], moving(3)[:, :, 4:])


def test_before_there_are_two_true_values_rows_are_shown_as_they_were() -> None:
    _, shown = store_after(1)
    assert torch.equal(shown[:, :, 4:], moving(0)[:, :, 4:])


def test_the_true_rows_are_found_again() -> None:
    """What is shown stands in their place, step after step; the change kept is that of true rows."""
    store, _ = store_after(9)
    trend = store._trends[0]
    first, others = (rows.change * rows.scale for rows in (trend._rows(0, 4), trend._rows(4, 12)))
    assert (first - (moving(9) - moving(8))[:, :, :4]).abs().max() < 0.05
    assert (others - (moving(8) - moving(7))[:, :, 4:]).abs().max() < 0.05


def test_rows_that_jump_about_are_shown_as_they_were() -> None:
    _, shown = store_after(4, noise=50.0)
    assert (shown[:, :, 4:] - moving(3, 50.0)[:, :, 4:]).abs().max() < 1e-3


def test_the_error_of_a_forecast_is_told_where_it_is_asked_for() -> None:
    assert store_after(4)[0].error == 0, "nobody asked"
    assert store_after(1, watched=True)[0].error == 0, "there was no forecast"
    assert store_after(4, watched=True)[0].error < 1e-3
    assert store_after(4, noise=50.0, watched=True)[0].error > 1


def test_what_a_forecast_keeps_is_an_eighth_of_a_byte_for_every_bit() -> None:
    kept = torch.zeros(2, 3, 12, 128, dtype=torch.bfloat16)
    assert Trend(kept).bytes == kept.nbytes // 2 + 2 * 3 * 12 * kept.element_size()


def test_nothing_of_the_pace_is_read_by_the_host() -> None:
    clock, time = Clock(), torch.ones(2, device="meta")  # of which nothing could be read
    for _ in range(3):
        pace = clock.tick(time)
        assert isinstance(pace, Pace)
        assert pace.ahead.is_meta


# -- whole pictures ------------------------------------------------------------------------------


def painted_by(place: Place, name: str, layout: dict[str, Any], blocks: int) -> Tensor | None:
    pipe = tiny.pipeline(name, blocks=blocks)
    rows = (2, 2, 1) if name in ("wan", "ltx") else (3, 2, 2)
    config = ParallelConfig(**{"patch_rows": rows, "split_batch": False, "forecast": True, **layout}, timeout=60)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    arguments = tiny.call_arguments(name, height=112, steps=2 * STEPS if name == "zimage" else STEPS)
    output = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent")
    return None if output is None else tiny.painted(output)


def paint(name: str, blocks: int = 4, **layout: Any) -> Tensor:
    ranks = ParallelConfig(**layout).world_size
    with over("nccl" if ranks > 1 else "gloo"):
        made = run_threads(ranks, painted_by, name, layout, blocks)
    return next(one for one in made if one is not None)


FAMILIES = ("flux", "sd35", "pixart", "qwen", "flux2", "zimage", "cogview4", "wan", "ltx")


@pytest.mark.some(of=4, first=1)
@pytest.mark.parametrize("name", FAMILIES)
def test_law_2_a_forecast_does_not_depend_on_the_number_of_stages(name: str) -> None:
    alone = paint(name)
    assert not torch.equal(alone, paint(name, forecast=False)), "nothing was forecast: nothing was tested"
    for stages in (2, 3, 4) if name == "flux" else (2 + FAMILIES.index(name) % 3,):  # families take turns
        assert torch.equal(paint(name, pipefusion=stages), alone), stages


@pytest.mark.some(of=3, first=1)
@pytest.mark.parametrize(
    "layout",
    [
        {"pipefusion": 2, "share_blocks": True, "warmup": 2},
        {"pipefusion": 2, "cfg": 2},
        {"pipefusion": 2, "split_batch": True},
    ],
    ids=str,
)
def test_a_forecast_is_the_same_in_every_layout(layout: dict[str, Any]) -> None:
    same = {name: value for name, value in layout.items() if name in ("warmup", "split_batch")}
    for name in ("flux", "sd35") if "cfg" not in layout else ("flux",):  # which guides by two calls, not by one batch
        assert torch.equal(paint(name, blocks=5, **layout), paint(name, blocks=5, **same)), name


@pytest.mark.some(of=3)
@pytest.mark.parametrize("method", ["ring", "ulysses", "tensor"])
def test_ranks_that_share_patches_forecast_up_to_the_order_of_sums(method: str) -> None:
    expected = paint("flux")
    assert (paint("flux", pipefusion=2, **{method: 2}) - expected).abs().max() < 1e-3 * expected.abs().max()


# -- how many steps are synchronous --------------------------------------------------------------


def steps_of(name: str, guided: bool, **options: Any) -> int:
    """Synchronous calls of a request of four steps."""
    pipe = tiny.pipeline(name)
    patchpipe.parallelize(pipe, ParallelConfig(patches=2, **options))
    pipe(**tiny.call_arguments(name, guided=guided), output_type="latent")
    return int(pipe.patchpipe.last.steps_synchronous)


@pytest.mark.parametrize(("name", "calls"), [("flux", 2), ("sd35", 1)])  # of a step: one for each branch, or one in all
def test_guidance_begins_with_two_synchronous_steps(name: str, calls: int) -> None:
    found = [steps_of(name, guided, forecast=forecast) for guided in (False, True) for forecast in (False, True)]
    assert found == [1, 1, calls, 2 * calls]
    assert steps_of(name, True) == 2 * calls, "which is the default"
    assert steps_of(name, True, warmup=1) == calls, "unless it is said otherwise"
    assert "warm-up 1 or 2 with guidance" in ParallelConfig(pipefusion=2).describe()
    assert "stale keys forecast" in ParallelConfig(pipefusion=2, forecast=True).describe()
    assert "stale keys as they were · warm-up 1" in ParallelConfig(pipefusion=2, forecast=False).describe()
    assert "stale" not in ParallelConfig(ulysses=2).describe()


def jumping(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    if step == 8:
        kwargs["latents"] = kwargs["latents"].neg()
    return kwargs


def watched_by(place: Place, name: str, layout: dict[str, Any], jumps: bool) -> tuple[int, Tensor | None]:
    pipe = tiny.pipeline(name, blocks=4)
    given = {"patch_rows": (3, 2, 2), "split_batch": False, "forecast": True, "warmup": "auto", "timeout": 60}
    config = ParallelConfig(**{**given, **layout})
    patchpipe.parallelize(pipe, config, group=place.join(config))
    arguments = tiny.call_arguments(name, height=112, steps=STEPS) | (
        {"callback_on_step_end": jumping} if jumps else {}
    )
    output = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent")
    return pipe.patchpipe.last.steps_synchronous, None if output is None else tiny.painted(output)


def watched(name: str, jumps: bool = True, **layout: Any) -> tuple[int, Tensor]:
    ranks = ParallelConfig(**layout).world_size
    with over("nccl" if ranks > 1 else "gloo"):
        made = run_threads(ranks, watched_by, name, layout, jumps)
    assert len({synchronous for synchronous, _ in made}) == 1, made
    return made[0][0], next(one for _, one in made if one is not None)


@pytest.mark.some(of=2)
@pytest.mark.parametrize(
    ("name", "calls", "layouts"),  # calls of a step: one for each branch, or one in all
    [
        ("flux", 2, [{"pipefusion": 2}, {"pipefusion": 4}, {"pipefusion": 2, "cfg": 2}]),
        ("sd35", 1, [{"pipefusion": 3}]),
    ],
    ids=("flux", "sd35"),
)
def test_a_step_is_synchronous_after_a_jump_on_all_ranks_alike(
    name: str, calls: int, layouts: list[dict[str, Any]]
) -> None:
    smooth, alone = watched(name, jumps=False)[0], watched(name)
    assert alone[0] == smooth + calls
    for layout in layouts:
        made = watched(name, **layout)
        assert made[0] == alone[0], layout
        assert torch.equal(made[1], alone[1]), layout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"forecast": False}, "needs a forecast: leave forecast=False out"),
        ({"ring": 2, "pipefusion": 2}, "is not supported with ring: leave it out, or use warmup=2"),
        ({"compile": True}, "is not supported with compile=True"),
    ],
)
def test_steps_that_nothing_tells_of_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ParallelConfig(warmup="auto", **options)


# -- the bundled model ---------------------------------------------------------------------------


def decibels(pipe: Any, expected: np.ndarray, **options: Any) -> float:
    patchpipe.parallelize(pipe, ParallelConfig(patches=8, warmup=1, **options))
    error = np.mean((picture(pipe) - expected) ** 2)
    patchpipe.restore(pipe)
    return float(-10 * np.log10(error))


def picture(pipe: Any) -> Any:
    torch.manual_seed(0)  # of schedulers that draw: these pipelines hand them no generator
    call = {"height": 128, "width": 128, "num_inference_steps": 16, "max_sequence_length": 32}
    output = pipe("red heart, flat style", generator=torch.Generator().manual_seed(0), output_type="np", **call)
    return None if output is None else output.images


def bundled() -> Any:
    pipe = FluxPipeline.from_pretrained(MODEL_DIR)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_forecast_brings_the_picture_nearer_to_one_device_s() -> None:
    pipe = bundled()
    expected = picture(pipe)
    stale, forecast = decibels(pipe, expected, forecast=False), decibels(pipe, expected)
    assert forecast > stale + 6, (stale, forecast)


def painted_in_parts(place: Place, pipes: list[Any], forecast: bool) -> np.ndarray | None:
    pipe, config = pipes[place.rank], ParallelConfig(distrifusion=4, forecast=forecast, timeout=120)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    made = picture(pipe)
    patchpipe.restore(pipe)
    return made


@pytest.mark.extra
def test_a_forecast_helps_ranks_that_see_the_others_late_most() -> None:
    pipes = [bundled() for _ in range(4)]  # not by the ranks: diffusers loads one at a time
    expected = picture(pipes[0])
    made = [run_threads(4, painted_in_parts, pipes, forecast)[0] for forecast in (False, True)]
    stale, forecast = (float(-10 * np.log10(np.mean((one - expected) ** 2))) for one in made)
    assert forecast > stale + 6, (stale, forecast)


@pytest.mark.extra
def test_fresh_noise_between_steps_loses_nothing() -> None:
    """Flow matching with noise drawn anew for each step: a forecast without its gate loses 14 dB."""
    pipe = bundled()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    expected = picture(pipe)
    stale, forecast = decibels(pipe, expected, forecast=False), decibels(pipe, expected)
    assert forecast > stale - 1, (stale, forecast)
