"""Bad input: one ``ValueError`` of one text on every rank, before any of them waits for another in vain."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import patchpipe
from patchpipe import ParallelConfig, models
from patchpipe.layout.patching import PatchCosts
from patchpipe.models.latent import Raster
from patchpipe.stage.patches import Cut
from tests import tiny
from tests.support.ranks import Place, run_ranks

Degrees = dict[str, Any]
RANKS = 2
MANNERS = ("parallelize", "from_pretrained")
MODELS = ("flux", "sd3", "pixart", "qwen")
TIMEOUT = 60  # seconds; a rank that waited for another so long would say so instead

# The layout of each rank, and what all of them are to say. PixArt's heads are three, its blocks four.
LAYOUTS: dict[str, tuple[list[Degrees], str]] = {
    "another number of ranks": ([{"pipefusion": 3}] * 2, "the layout needs 3 ranks (pipefusion 3"),
    "more stages than blocks": ([{"pipefusion": 5}] * 2, "pipefusion=5 is more stages than the 4 blocks"),
    "blocks that do not add up": ([{"pipefusion": 2, "stage_blocks": (2, 1)}] * 2, "adds up to 3 but"),
    "heads that do not divide": ([{"tensor": 2}] * 2, "use tensor=1 or 3"),
    "fewer heads than ranks": ([{"tensor": 5}] * 2, "tensor=5 does not divide the 3 attention heads"),
    "no plan to split matrices": ([{"tensor": 2}] * 2, "tensor=2 is not supported for PixArtTransformer2DModel"),
    "different schedules": (
        [{"ring": 2, "warmup": 1}, {"ring": 2, "warmup": 3}],
        "config.warmup is 1 on rank 0 but 3 on rank 1",
    ),
    "different methods": ([{"ring": 2}, {"ulysses": 2}], "the ranks were started differently: config.ring is 2 on"),
    "one that fits, one that does not": ([{"cfg": 2}, {"tensor": 5}], "config.cfg is 2 on rank 0 but 1 on rank 1"),
}


def as_torchrun_starts(place: Place) -> None:
    """The environment in which ranks find each other without a group of their own."""
    assert place.store is not None
    os.environ |= {"RANK": str(place.rank), "WORLD_SIZE": str(place.world_size), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(place.store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}  # type: ignore[attr-defined]


def spread(manner: str, name: str, folder: Path, config: ParallelConfig) -> Any:
    """A pipeline made parallel in one of the two ways, without a group given."""
    if manner == "parallelize":
        return patchpipe.parallelize(tiny.pipeline(name), config)
    return patchpipe.from_pretrained(folder, config, device="cpu")


@contextmanager
def plans_without_tensor() -> Iterator[None]:
    kept, models.PLANS = models.PLANS, tuple(dataclasses.replace(plan, tensor=None) for plan in models.PLANS)
    try:
        yield
    finally:
        models.PLANS = kept


def told(attempt: Callable[[], Any]) -> str:
    """Kind and text of what is raised."""
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused_layouts(place: Place, folder: Path) -> dict[tuple[str, str], str]:
    """What this rank says to every bad layout, in both ways."""
    as_torchrun_starts(place)
    found = {}
    for title, (layouts, _) in LAYOUTS.items():
        config = ParallelConfig(**layouts[place.rank], timeout=TIMEOUT)
        for manner in MANNERS:
            without = plans_without_tensor() if "no plan" in title else nullcontext()
            with without:
                found[title, manner] = told(partial(spread, manner, "pixart", folder, config))
    return found


def test_every_rank_refuses_a_bad_layout_in_the_same_words(tmp_path: Path) -> None:
    first, second = run_ranks(RANKS, refused_layouts, tiny.save("pixart", tmp_path))
    assert first == second
    for (title, manner), text in first.items():
        assert text.startswith("ValueError: "), (title, manner, text)
        assert LAYOUTS[title][1] in text, (title, manner, text)
        assert "\n" not in text


WORDS = {
    "few rows": "a patch of 1 token rows cannot be shared by 2 ranks",
    "few pictures": "data=2 splits the pictures of a call, but there are only 1",
}


def unguided(name: str) -> dict[str, Any]:
    """A call of two pictures without guidance: even in number, so that the batch alone does not tell."""
    arguments = tiny.call_arguments(name, guided=False, height=112, steps=2) | {"num_images_per_prompt": 2}
    return {**arguments, "true_cfg_scale": 4.0} if name == "qwen" else arguments


def refused_requests(place: Place, folders: dict[str, Path]) -> dict[tuple[str, str], list[str]]:
    """What this rank says to requests that do not fit, and to a right one after them."""
    as_torchrun_starts(place)
    found = {}
    for name, folder in folders.items():
        for manner in MANNERS:
            config = ParallelConfig(cfg=2, patches=3, timeout=TIMEOUT)
            pipe = spread(manner, name, folder, config)
            right = tiny.call_arguments(name, height=112, steps=2) | {"output_type": "latent"}
            low = {**right, "height": 32}
            found[name, manner] = [told(partial(pipe, **call)) for call in (right, unguided(name), low, right)]
            patchpipe.restore(pipe)
        config = ParallelConfig(ulysses=2, timeout=TIMEOUT)
        pipe = spread("parallelize", name, folder, config)
        found[name, "few rows"] = [told(partial(pipe, **call)) for call in ({**right, "height": 16}, right)]
        patchpipe.restore(pipe)
        pipe = spread("parallelize", name, folder, ParallelConfig(data=2, timeout=TIMEOUT))
        calls = (unguided(name) | {"num_images_per_prompt": 1}, right | {"num_images_per_prompt": 2})
        found[name, "few pictures"] = [told(partial(pipe, **call)) for call in calls]
        patchpipe.restore(pipe)
    return found


def test_every_rank_refuses_a_bad_request_in_the_same_words_and_goes_on(tmp_path: Path) -> None:
    folders = {name: tiny.save(name, tmp_path / name) for name in MODELS}
    first, second = run_ranks(RANKS, refused_requests, folders)
    assert first == second
    for (name, manner), texts in first.items():
        assert texts[0 if manner in MANNERS else 1] == texts[-1] == "nothing", (name, manner, texts)
        if manner not in MANNERS:
            assert texts[0].startswith(f"ValueError: {WORDS[manner]}")
            continue
        assert texts[1].startswith("ValueError: cfg=2 gives the second branch of guidance ranks of its own"), texts
        assert ("true_cfg_scale above 1" if name in ("flux", "qwen") else "guidance_scale above 1") in texts[1]
        assert "patches=3 is more than the 2 token rows" in texts[2]


def lone_trouble(place: Place, folder: Path, broken: Path) -> list[str]:
    """What ranks hear when one alone finds no model, when a group was joined for another layout, when weights lack."""
    as_torchrun_starts(place)
    config = ParallelConfig(ring=2, timeout=TIMEOUT)
    path = folder if place.rank == 0 else folder / "not here"
    group = place.join(ParallelConfig(ulysses=2, timeout=TIMEOUT))

    def load_and_paint() -> None:
        pipe = patchpipe.from_pretrained(broken if place.rank else folder, config, device="cpu")
        pipe(**tiny.call_arguments("pixart", height=112, steps=2), output_type="latent")

    return [
        told(lambda: patchpipe.from_pretrained(path, config, device="cpu")),
        told(lambda: patchpipe.from_pretrained(path, config, group=place.join(config))),
        told(lambda: patchpipe.parallelize(tiny.pipeline("pixart"), config, group=group)),
        told(load_and_paint),
    ]


def test_the_others_hear_of_a_rank_that_cannot_go_on(tmp_path: Path) -> None:
    folder = tiny.save("pixart", tmp_path / "whole")
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(weights).items() if name != "proj_out.bias"}, weights)
    first, second = run_ranks(RANKS, lone_trouble, folder, broken)
    for ours, theirs in zip(first[:2], second[:2], strict=True):
        assert theirs.startswith("FileNotFoundError: ")
        assert ours == f"RankFailed: rank 1 failed first: {theirs}"
    assert second[3].startswith("ValueError: the weights in ")
    assert first[3] == f"RankFailed: rank 1 failed first: {second[3]}"
    assert first[2] == second[2]
    assert first[2].startswith("ValueError: the group was joined for another layout (ulysses 2")


def test_the_number_of_patches_is_chosen_so_that_ranks_can_share_each() -> None:
    """7 rows among 4 ranks: two patches, as two stages would want, would leave 3 rows to the first."""
    config, costs = ParallelConfig(pipefusion=2, ring=2, ulysses=2), PatchCosts(tokens=16)
    assert [len(Cut.of(Raster(count, 3, 1), config, costs=costs).patches) for count in (4, 7, 8, 11, 12)] == [
        1,
        1,
        2,
        2,
        2,
    ]
    cut = Cut.of(Raster(7, 3, 1), ParallelConfig(pipefusion=2, ring=2, ulysses=2, patches=2))
    with pytest.raises(ValueError, match="cannot be shared by 4 ranks"):
        cut.split(cut.patches[0], 4)
