"""Every parallel method and product of methods against one process: exact methods and stale ones alike.

Synchronous schedules on one process are bit-equal to plain diffusers (law 1), patched ones are the oracle
(law 2), so equality with one process is equality with those.
"""

from __future__ import annotations

import pytest

from tests import parity
from tests.ranks import run_ranks

MODELS = ("flux", "sd3", "pixart")  # Qwen-Image, whose text is masked, is in test_masks.py
SCHEDULES = [{"warmup": "all"}, {"patches": 2, "warmup": 1}, {"patches": 2, "warmup": 0}]
TWO = [{"ulysses": 2}, {"cfg": 2}, {"pipefusion": 2}]
THREE = [{"ulysses": 3}]
FOUR = [{"pipefusion": 2, "ulysses": 2}, {"cfg": 2, "pipefusion": 2}, {"cfg": 2, "ulysses": 2}]
EIGHT = [{"cfg": 2, "pipefusion": 2, "ulysses": 2}]


@pytest.mark.parametrize("layouts", [TWO, THREE, FOUR, EIGHT], ids=["2", "3", "4", "8"])
@pytest.mark.parametrize("name", [*MODELS, "sd35"])
def test_layouts_paint_what_one_process_paints(name, layouts):
    errors = parity.differences(name, layouts, SCHEDULES)
    assert max(errors.values()) <= parity.TOLERANCE, errors


@pytest.mark.parametrize("name", MODELS)
def test_data_parallel_pictures_are_those_of_one_device(name):
    layouts = [{"data": 2}]
    errors = parity.differences(name, layouts, SCHEDULES, num_images_per_prompt=3)
    assert max(errors.values()) <= parity.TOLERANCE, errors
    errors = parity.differences(name, [{"data": 2, "pipefusion": 2}], SCHEDULES, num_images_per_prompt=2)
    assert max(errors.values()) <= parity.TOLERANCE, errors


def test_ulysses_sends_what_its_formula_says():
    """Per attention 4·(p·h/U)·(U-1)/U elements from each rank (arXiv 2309.14509, section 3)."""
    schedule, steps = {"warmup": "all"}, 2
    call = {"height": 128, "width": 64, "num_inference_steps": steps, "max_sequence_length": 8}
    call |= {"negative_prompt": None, "true_cfg_scale": 1.0}
    ranks = run_ranks(2, parity.paint, "flux", [{"ulysses": 2}], [schedule], call)
    tokens, width, blocks, size = 8 * 4 + 8, 32, 4, 8
    exchanged = 4 * (tokens * width // 2) // 2 * blocks * size * steps
    answers = 8 * 4 // 2 * 16 * size * steps  # each holds the latent, so each needs the other's half of it
    for rank in ranks:
        assert rank[str(({"ulysses": 2}, schedule))]["sent_bytes"] == exchanged + answers


def test_pipefusion_sends_what_its_formula_says():
    """Per stage boundary p·h elements a step, whatever the blocks (arXiv 2405.14430, section 3.3)."""
    schedule, steps = {"patches": 4, "warmup": 1}, 3
    call = {"height": 128, "width": 64, "num_inference_steps": steps, "max_sequence_length": 8}
    call |= {"negative_prompt": None, "true_cfg_scale": 1.0}
    first, last = run_ranks(2, parity.paint, "flux", [{"pipefusion": 2}], [schedule], call)
    image, text, width, size = 8 * 4, 8, 32, 8
    key = str(({"pipefusion": 2}, schedule))
    assert first[key]["sent_bytes"] == (image + text) * width * size * steps
    assert last[key]["sent_bytes"] == image * 16 * size * steps


@pytest.mark.parametrize("layout", [{}, {"pipefusion": 2}, {"pipefusion": 2, "ulysses": 2}], ids=str)
def test_keys_and_values_take_what_their_formula_says(layout):
    """2·p·h·L/N elements for the batch, over the heads' ranks (arXiv 2405.14430, table 1)."""
    schedule = {"patches": 2, "warmup": 1}
    call = {"height": 128, "width": 64, "num_inference_steps": 2, "max_sequence_length": 8, "num_images_per_prompt": 2}
    call |= {"negative_prompt": None, "true_cfg_scale": 1.0}
    stages, heads = layout.get("pipefusion", 1), layout.get("ulysses", 1)
    tokens, width, blocks, size, batch = 8 * 4 + 8, 32, 4, 8, 2
    for rank in run_ranks(stages * heads, parity.paint, "flux", [layout], [schedule], call):
        kept = rank[str((layout, schedule))]["store_bytes"]
        assert kept == 2 * tokens * width * blocks // stages // heads * size * batch


def test_ranks_for_a_second_branch_need_one():
    call = {"negative_prompt": None, "true_cfg_scale": 1.0}
    with pytest.raises(AssertionError, match=r"(?s)rank 0.*cfg=2 sets ranks aside.*rank 1.*cfg=2 sets ranks aside"):
        run_ranks(2, parity.paint, "flux", [{"cfg": 2}], [{"patches": 2, "warmup": 1}], call)
    with pytest.raises(AssertionError, match="cfg=2 splits the two branches of guidance, but this call has none"):
        run_ranks(2, parity.paint, "sd3", [{"cfg": 2}], [{"patches": 2, "warmup": 1}], {"guidance_scale": 1.0})
