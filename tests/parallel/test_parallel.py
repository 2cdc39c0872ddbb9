"""Every parallel method and product of methods against plain diffusers and the naive oracle.

Where every step is a warm-up step, latents are compared with those of plain diffusers on one device; where patches
stream, with those of the naive PipeFusion of `tests/support/oracle.py`, which knows nothing of ranks.
"""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

import patchpipe
from patchpipe import ParallelConfig
from tests import tiny
from tests.support import parity
from tests.support.nccl_rules import over
from tests.support.ranks import run_ranks
from tests.support.threads import run_threads

MODELS = ("pixart", "flux", "sd3")  # the quickest first: most layouts run with it. Qwen-Image is in test_masks.py
SCHEDULES = [{"warmup": "all"}, {"patches": 2, "warmup": 1}, {"patches": 2, "warmup": 0, "split_batch": True}]
# Rows of three tokens, odd in number, and of PixArt three heads: few of these degrees divide them.
LAYOUTS: list[dict[str, int]] = [
    *({degree: 2} for degree in ("pipefusion", "cfg", "ulysses", "ring", "tensor")),
    *({degree: 3} for degree in ("pipefusion", "ulysses", "ring")),
    {"pipefusion": 2, "ulysses": 2},
    {"pipefusion": 2, "ring": 2},
    {"pipefusion": 2, "tensor": 2},
    {"cfg": 2, "pipefusion": 2},
    {"cfg": 2, "ulysses": 2},
    {"cfg": 2, "ring": 2},
    {"data": 2, "pipefusion": 2},
    {"ulysses": 2, "ring": 2},
    {"ulysses": 2, "tensor": 2},
    {"ring": 4},
    *({"pipefusion": 3, other: 2} for other in ("ulysses", "ring", "tensor")),  # stages of 4 blocks differ by half
    {"cfg": 2, "pipefusion": 2, "ulysses": 2},
    {"pipefusion": 2, "ring": 2, "ulysses": 2},
]


def ranks_of(layout: dict[str, int]) -> int:
    return prod(layout.values())


# Of every other family fewer: what is special to it is how its rows are cut, which all methods do alike.
FAMILIES = ("sd35", "flux2", "zimage", "cogview4", "wan", "wan-i2v", "wan-a14b", "wan-5b", "ltx")
FAMILY_LAYOUTS: list[dict[str, int]] = [
    *({degree: 2} for degree in ("pipefusion", "cfg", "ulysses", "ring")),
    {"pipefusion": 3},
    {"pipefusion": 2, "ulysses": 2},
    {"pipefusion": 2, "ring": 2},
    {"cfg": 2, "pipefusion": 2},
]

# Under NCCL's rules all of them; over gloo, which `test_combinations.py` has between processes, some.
EACH = [(name, layout, "nccl") for layout in LAYOUTS for name in MODELS]
EACH += [("pixart", layout, "gloo") for layout in LAYOUTS if ranks_of(layout) == 4]


@pytest.mark.some
@pytest.mark.parametrize(("name", "layout", "transport"), EACH, ids=str)
def test_layouts_paint_what_one_device_paints(name: str, layout: dict[str, int], transport: str) -> None:
    call: dict[str, Any] = {"num_inference_steps": 3}  # a whole one, one that sees it, and one that sees that one
    if ranks_of(layout) > 3:  # patches of rows enough for four ranks, and pictures to share
        call |= {"height": 16 * 9, "num_images_per_prompt": 2}
    with over(transport):
        errors = parity.differences(name, [layout], SCHEDULES, run=run_threads, **call)
    assert max(errors.values()) <= parity.TOLERANCE, errors


@pytest.mark.some
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layout", FAMILY_LAYOUTS, ids=str)
def test_every_family_paints_what_one_device_paints(name: str, layout: dict[str, int]) -> None:
    call: dict[str, Any] = {"num_inference_steps": 6 if name == "wan-a14b" else 3}  # each transformer warms up
    if ranks_of(layout) > 3:  # frames or rows enough for four ranks
        call |= {"num_frames": 65 if name == "ltx" else 33} if name.startswith(("wan", "ltx")) else {"height": 16 * 9}
    with over("nccl"):
        errors = parity.differences(name, [layout], SCHEDULES[:2], run=run_threads, **call)
    assert max(errors.values()) <= parity.tolerance(name), errors


@pytest.mark.some(of=3, first=1)
@pytest.mark.parametrize("name", MODELS)
def test_data_parallel_pictures_are_those_of_one_device(name: str) -> None:
    """Picture k is the same whatever the degree: of one prompt or of several, with one seed or one for each."""
    several: dict[str, Any] = {"prompt": [tiny.PROMPT, tiny.OTHER_PROMPT, "frog"], "seeds": [5, 3, 8]}
    if name == "flux":
        several["negative_prompt"] = [tiny.OTHER_PROMPT] * 3
    two: list[dict[str, int]] = [{"data": 2}]
    for layouts, call in (
        (two, {"num_images_per_prompt": 3}),
        (two, several),
        ([{"data": 3}], several),
        ([{"data": 2, "pipefusion": 2}], several),
    ):
        errors = parity.differences(name, layouts, SCHEDULES[:2], **call)
        assert max(errors.values()) <= parity.TOLERANCE, (layouts, call, errors)


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


@pytest.mark.some(of=2)
@pytest.mark.parametrize("layout", [{"cfg": 2}, {"data": 2}], ids=str)
@pytest.mark.parametrize("name", ["flux", "sd3"])  # two calls a step, and one call of both branches
def test_ranks_of_branches_and_pictures_send_their_predictions_alone(name, layout):
    """A rank gives the predictions it made, as wide as the latent's channels, to the other one."""
    schedule, steps, images = {"warmup": "all"}, 2, 2
    call = {"height": 128, "width": 64, "num_inference_steps": steps, "num_images_per_prompt": images}
    entries = 2 * images  # of the batch in a step, both branches of guidance counted
    for rank in run_ranks(2, parity.paint, name, [layout], [schedule], call):
        assert rank[str((layout, schedule))]["sent_bytes"] == entries // 2 * (8 * 4 * 16) * 8 * steps


HOLDING: dict[int, list[dict[str, int]]] = {  # how tensor divides matrices is in test_tensor.py
    2: [{degree: 2} for degree in ("pipefusion", "cfg", "data", "ulysses", "ring", "distrifusion")],
    4: [{"pipefusion": 4}, {"pipefusion": 2, "ring": 2}, {"cfg": 2, "pipefusion": 2}],
}


@pytest.mark.some(of=3)
@pytest.mark.parametrize("ranks", HOLDING)
@pytest.mark.parametrize("name", MODELS)
def test_parameters_take_what_their_formula_says(name, ranks, tmp_path):
    """Blocks over stages, all that surrounds them everywhere; the other methods split none."""
    held = run_ranks(ranks, parameter_bytes, tiny.save(name, tmp_path / name), HOLDING[ranks])
    whole = by_place(tiny.pipeline(name).transformer)
    for index, layout in enumerate(HOLDING[ranks]):
        own, stages = [rank[index] for rank in held], layout.get("pipefusion", 1)
        assert sum(found["blocks"] for found in own) == whole["blocks"] * ranks // stages, layout
        if name == "pixart":  # whose blocks are all alike
            assert {found["blocks"] for found in own} == {whole["blocks"] // stages}, layout
        assert {found["others"] for found in own} == {whole["others"]}, layout


def parameter_bytes(place, folder, layouts):
    configs = [ParallelConfig(**layout) for layout in layouts]
    pipes = [patchpipe.from_pretrained(folder, config, group=place.join(config)) for config in configs]
    return [by_place(pipe.transformer) for pipe in pipes]


def by_place(model):
    """Bytes of the parameters that are really there."""
    found = {"blocks": 0, "others": 0}
    for title, parameter in model.named_parameters():
        found["blocks" if "blocks." in title else "others"] += 0 if parameter.is_meta else parameter.nbytes
    return found


KEEPING: dict[int, list[dict[str, int]]] = {  # distrifusion, which cuts no patches, is in test_displaced.py
    1: [{}],
    2: [{degree: 2} for degree in ("pipefusion", "data", "ulysses", "ring", "tensor")],
    4: [{"pipefusion": 2, other: 2} for other in ("ulysses", "ring", "tensor", "data")],
}


@pytest.mark.some(of=3, first=2)
@pytest.mark.parametrize("ranks", KEEPING)
def test_keys_and_values_take_what_their_formula_says(ranks):
    """2·p·h·L/N elements for the batch, over the heads' ranks; a ring's ranks keep all (arXiv 2405.14430, table 1)."""
    schedule = {"patches": 2, "warmup": 1}
    call = {"height": 128, "width": 64, "num_inference_steps": 2, "max_sequence_length": 8, "num_images_per_prompt": 2}
    call |= {"negative_prompt": None, "true_cfg_scale": 1.0}
    tokens, width, blocks, size, batch = 8 * 4 + 8, 32, 4, 8, 2
    for rank in run_ranks(ranks, parity.paint, "flux", KEEPING[ranks], [schedule], call):
        for layout in KEEPING[ranks]:
            ways = ranks // layout.get("ring", 1)
            assert rank[str((layout, schedule))]["store_bytes"] == 2 * tokens * width * blocks // ways * size * batch
