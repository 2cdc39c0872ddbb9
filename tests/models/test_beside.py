"""Ideogram 4: a latent that begins with room for the text, and a second transformer called in every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.engine.requests import with_one_strength
from patchpipe.models import names_transformer, plan_for, transformers_of
from patchpipe.models.latent import Raster
from patchpipe.parallel.refusals import guided
from patchpipe.stage.patches import Cut
from tests import tiny
from tests.support.parity import call_pipeline
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads

PLAN = plan_for("Ideogram4Transformer2DModel")
STREAM: dict[str, Any] = {"patch_rows": (1, 1, 2), "warmup": 1}
SEVERAL = {  # prompts of different lengths, each twice, and a strength for every step
    "prompt": [tiny.PROMPT, tiny.OTHER_PROMPT],
    "num_images_per_prompt": 2,
    "guidance_scale": None,
    "guidance_schedule": (7.0, 5.0, 3.0),
    "num_inference_steps": 3,
}


def setup_module() -> None:
    quieten()


def paint(place: Place | None, options: dict[str, Any], call: dict[str, Any]) -> tuple[np.ndarray | None, Any]:
    """Latents, and what the request did; of plain diffusers without options."""
    pipe = tiny.pipeline("ideogram4")
    if options:
        config = ParallelConfig(timeout=60, **options)
        patchpipe.parallelize(pipe, config, group=place and place.join(config))
    output = call_pipeline(pipe, {**tiny.call_arguments("ideogram4"), **call})
    return (None if output is None else np.asarray(output.images)), options and pipe.patchpipe.last


def test_prompts_of_different_lengths_and_strengths_by_step_are_painted_as_one_device_does() -> None:
    plain, _ = paint(None, {}, SEVERAL)
    whole, _ = run_threads(2, paint, {"pipefusion": 2, "warmup": "all"}, SEVERAL)[0]
    assert np.array_equal(whole, plain)
    one, _ = paint(None, STREAM, SEVERAL)
    two, did = run_threads(2, paint, {"pipefusion": 2, **STREAM}, SEVERAL)[0]
    assert np.array_equal(two, one)
    assert not np.array_equal(two, plain), "staleness moves nothing: nothing was tested"
    assert did.materialisations == 1, "what both transformers predict meets patch by patch"


def test_each_transformer_warms_up_once_and_keeps_its_keys_while_the_other_is_called() -> None:
    pipe = tiny.pipeline("ideogram4")
    seen: list[nn.Module] = []
    for model in transformers_of(pipe).values():
        model.register_forward_pre_hook(lambda module, _: seen.append(module))
    patchpipe.parallelize(pipe, ParallelConfig(**STREAM))
    call_pipeline(pipe, tiny.call_arguments("ideogram4", steps=3))
    assert seen == [pipe.transformer, pipe.unconditional_transformer] * 3
    did = pipe.patchpipe.last
    assert (did.steps_synchronous, did.steps_patched) == (2, 4)
    patchpipe.restore(pipe)
    assert not any("forward" in vars(model) for model in transformers_of(pipe).values())


def test_what_a_pipeline_calls_beside_its_transformer_is_known_by_name() -> None:
    assert names_transformer("unconditional_transformer")
    assert not names_transformer("condition_transformer")


@pytest.mark.parametrize("strength", [None, 1.0, 7.0])
def test_guidance_is_there_whatever_its_strength(strength: float | None) -> None:
    assert guided({"guidance_scale": strength}, PLAN)


def test_one_strength_takes_the_place_of_the_usual_ones_by_step() -> None:
    known = ("prompt", "guidance_scale", "guidance_schedule")
    assert with_one_strength({"guidance_scale": 3.0}, known) == {"guidance_scale": 3.0, "guidance_schedule": None}
    for given in ({"guidance_schedule": (3.0,)}, {"guidance_scale": 3.0, "guidance_schedule": (3.0,)}):
        assert with_one_strength(given, known) == given
    assert with_one_strength({"guidance_scale": 3.0}, known[:2]) == {"guidance_scale": 3.0}


# -- room before the picture ---------------------------------------------------------------------


def sequence(*parts: tuple[int, int, int], entries: int = 1) -> dict[str, torch.Tensor]:
    """Roles and positions of a sequence: its parts as role, rows and columns."""
    roles, ids = [], []
    for role, rows, columns in parts:
        roles += [role] * rows * columns
        ids += [[0, row, column] for row in range(rows) for column in range(columns)]
    found = {"indicator": torch.tensor([roles] * entries), "position_ids": torch.tensor([ids] * entries)}
    return {**found, "hidden_states": torch.zeros(entries, len(roles), 16)}


def raster(call: dict[str, torch.Tensor]) -> Raster:
    return PLAN.grid.rows(nn.Module(), call["hidden_states"].shape, call)


def test_the_picture_is_what_has_its_role_at_the_end() -> None:
    assert raster(sequence((0, 1, 3), (3, 1, 5), (2, 4, 3), entries=2)) == Raster(4, 3, 3, room=8)
    assert raster(sequence((2, 4, 3))) == Raster(4, 3, 3)


@pytest.mark.parametrize(
    "parts",
    [
        ((3, 1, 5), (2, 4, 3), (3, 1, 5), (2, 4, 3)),  # two pictures in one sequence
        ((2, 4, 3), (3, 1, 5)),  # the text comes last
        ((3, 1, 5),),
        ((3, 1, 5), (2, 2, 3), (2, 2, 2)),  # of different widths
    ],
)
def test_other_sequences_are_refused(parts: tuple[tuple[int, int, int], ...]) -> None:
    with pytest.raises(ValueError, match="several pictures packed into one are not supported, paint them one after"):
        raster(sequence(*parts))


def test_pictures_at_different_places_of_a_batch_are_refused() -> None:
    call = sequence((3, 1, 5), (2, 4, 3), entries=2)
    call["indicator"][1, 4] = 2
    with pytest.raises(ValueError, match="at the end of each sequence"):
        raster(call)


def test_the_room_is_the_first_patchs_in_the_latent_and_the_texts_rows_are_spread() -> None:
    cut = Cut.of(Raster(4, 3, 3, room=8), ParallelConfig(patch_rows=(1, 3), text_patches=2), 8, spreads=True)
    assert cut.bounds == (0, 11, 20)
    assert [patch.units for patch in cut.patches] == [(0, 11), (11, 20)]
    assert [patch.tokens for patch in cut.patches] == [(0, 3), (3, 12)]
    assert [patch.rider_range(8) for patch in cut.patches] == [(0, 4), (4, 8)]
    assert cut.whole.units == (0, 20)
    assert [piece.units for piece in cut.split(cut.whole, 2)] == [(0, 14), (14, 20)]


# -- text ----------------------------------------------------------------------------------------


def from_disk(place: Place, folder: Path, text_rank: Any, expected: np.ndarray) -> None:
    config = ParallelConfig(pipefusion=2, warmup="all", text_rank=text_rank, timeout=60)
    pipe = patchpipe.from_pretrained(folder, config, group=place.join(config), torch_dtype=torch.float32)
    made = call_pipeline(pipe, tiny.call_arguments("ideogram4", steps=2))
    assert place.rank != 0 or np.array_equal(made.images, expected)


@pytest.mark.some
@pytest.mark.parametrize("text_rank", ["spread", "layers", "disk"])
def test_a_pipeline_that_calls_its_encoders_layers_itself_has_them_where_it_is_asked(
    text_rank: str, tmp_path: Path
) -> None:
    folder = tiny.save("ideogram4", tmp_path)
    expected = call_pipeline(tiny.pipeline("ideogram4"), tiny.call_arguments("ideogram4", steps=2)).images
    run_threads(2, from_disk, folder, text_rank, np.asarray(expected))


def rewrites(place: Place) -> None:
    config, pipe = ParallelConfig(pipefusion=2, timeout=60), tiny.pipeline("ideogram4")
    patchpipe.parallelize(pipe, config, group=place.join(config))
    with pytest.raises(ValueError, match="prompts are not rewritten on several ranks"):
        pipe(**tiny.call_arguments("ideogram4"), prompt_upsampling=True)
    assert call_pipeline(pipe, tiny.call_arguments("ideogram4", steps=1)) is not None or place.rank


def test_prompts_are_not_rewritten_on_several_ranks() -> None:
    run_threads(2, rewrites)
