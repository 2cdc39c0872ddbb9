"""A start on fewer tokens: a quarter of them stands for all, and no step is synchronous."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.models.latent import Raster
from patchpipe.planner.schedule import Unit, total
from patchpipe.stage.coarse.sample import Sample
from patchpipe.stage.rows import Rows
from tests import tiny
from tests.nccl_rules import over
from tests.oracle import naive_pipefusion
from tests.ranks import Place, quieten
from tests.threads import run_threads

FAMILIES = ("flux", "sd35", "pixart", "qwen", "qwen-padded", "flux2", "zimage", "cogview4", "wan", "wan-a14b", "ltx")


def setup_module() -> None:
    quieten()


# -- which tokens --------------------------------------------------------------------------------


def test_every_second_token_of_every_second_row_stands_for_its_neighbours() -> None:
    sample = Sample(Raster(count=5, tokens=3, units=3))
    assert (sample.raster.count, sample.raster.tokens) == (3, 2)
    tokens = sample.tokens(sample.cut.whole, torch.device("cpu"))
    assert tokens.tolist() == [0, 2, 6, 8, 12, 14]
    stands_for = tokens[sample.nearest(torch.device("cpu"))].view(5, 3)
    assert stands_for.tolist() == [[0, 0, 2], [0, 0, 2], [6, 6, 8], [6, 6, 8], [12, 12, 14]]


def test_of_a_clip_cut_by_rows_every_frame_has_its_own() -> None:
    """Tokens come frame by frame; what is kept is in the order of the axis that is cut."""
    sample = Sample(Raster(count=2, tokens=8, units=1, outer=2))  # two frames of two rows of four
    tokens = sample.tokens(sample.cut.whole, torch.device("cpu"))
    assert tokens.tolist() == [0, 2, 8, 10]
    stands_for = tokens[sample.nearest(torch.device("cpu"))]
    assert stands_for.view(2, 2, 4).tolist() == [[[0, 0, 2, 2], [8, 8, 10, 10]]] * 2


def test_neighbours_are_so_far_and_none_is_beyond_the_edge() -> None:
    sample, device = Sample(Raster(count=3, tokens=4, units=4)), torch.device("cpu")
    assert sample.tokens(sample.cut.whole, device, (1, 1)).tolist() == [5, 7, 9, 11]
    at_each = [sample.tokens(sample.cut.whole, device, offset).view(1, 1, -1, 1) for offset in sample.offsets]
    spread = sample.spread(at_each, Rows(("image",), (4,), sample.raster), 2)
    assert spread.flatten().tolist() == list(range(12))


# -- what is kept --------------------------------------------------------------------------------


def first_keys(pipe: Any, name: str, **arguments: Any) -> Tensor:
    """Keys of the first layer as a coarse start leaves them."""
    seen: list[Tensor] = []
    from patchpipe.stage.keys.store import LayerStore

    class Noted(LayerStore):
        def fill(self, ordered: Any, **options: Any) -> None:
            seen.append(ordered[0].clone())
            super().fill(ordered, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("patchpipe.stage.stage.LayerStore", Noted)
        pipe(**tiny.call_arguments(name, guided=False, steps=2), output_type="latent", **arguments)
    return seen[0]


@pytest.mark.parametrize("name", ["flux", "qwen", "flux2"])
def test_keys_stand_at_the_positions_of_all_tokens(name: str) -> None:
    """Where a picture has the sample's tokens at its neighbours' places too, it has the same keys, turned alike."""
    pipe = tiny.pipeline(name, dtype=torch.float64)
    found: list[Tensor] = []
    for warmup in ("coarse", 1):
        patchpipe.parallelize(pipe, ParallelConfig(patches=4, warmup=warmup))
        forward = pipe.transformer.forward

        def repeated(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            grid = kwargs["hidden_states"].unflatten(1, (4, -1))
            kwargs["hidden_states"] = repeat(repeat(grid, 1), 2).flatten(1, 2)
            return forward(*args, **kwargs)

        pipe.transformer.forward = repeated
        found.append(first_keys(pipe, name, generator=torch.Generator().manual_seed(0)))
        pipe.transformer.forward = forward
        patchpipe.restore(pipe)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def repeat(latent: Tensor, dim: int) -> Tensor:
    """Every second token along a dim in the place of the next one too."""
    return latent.index_select(dim, torch.arange(latent.shape[dim]) // 2 * 2)


# -- whole pictures ------------------------------------------------------------------------------


def painted_by(place: Place, name: str, layout: dict[str, Any]) -> Tensor | None:
    pipe = tiny.pipeline(name, blocks=4)
    clip = name.startswith(("wan", "ltx"))
    rows = (2, 2, 1) if clip else (3, 2, 2)
    given = {"patch_rows": rows, "warmup": "coarse", "split_batch": False, "timeout": 60, **layout}
    config = ParallelConfig(**given)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    arguments = tiny.call_arguments(name, height=112, steps=4 if name == "wan-a14b" else 3)
    output = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent")
    stats = pipe.patchpipe.last
    assert (stats.steps_synchronous, stats.steps_patched > 0) == (0, True)
    return None if output is None else tiny.painted(output)


def paint(name: str, **layout: Any) -> Tensor:
    ranks = ParallelConfig(**layout).world_size
    with over("nccl" if ranks > 1 else "gloo"):
        made = run_threads(ranks, painted_by, name, layout)
    return next(one for one in made if one is not None)


@pytest.mark.some(of=2)
@pytest.mark.parametrize("name", FAMILIES)
def test_law_2_a_coarse_start_does_not_depend_on_the_number_of_stages(name: str) -> None:
    alone = paint(name)
    assert not torch.equal(alone, paint(name, warmup=0)), "nothing stood for what was not there: nothing was tested"
    for stages in (2, 3, 4):
        assert torch.equal(paint(name, pipefusion=stages), alone), stages


@pytest.mark.parametrize(
    "layout",
    [{"pipefusion": 2, "cfg": 2}, {"pipefusion": 2, "split_batch": True}, {"pipefusion": 2, "forecast": True}],
    ids=str,
)
def test_a_coarse_start_is_the_same_in_every_layout(layout: dict[str, Any]) -> None:
    same = {name: value for name, value in layout.items() if name not in ("pipefusion", "cfg")}
    name = "flux" if "cfg" in layout else "sd35"
    assert torch.equal(paint(name, **layout), paint(name, **same))


def test_ranks_that_split_matrices_start_alike_up_to_the_order_of_sums() -> None:
    expected = paint("flux")
    assert (paint("flux", pipefusion=2, tensor=2) - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", ["sd3", "pixart"])
def test_a_coarse_start_is_what_it_means(name: str) -> None:
    """Compared with the naive one, where no key is turned to its position."""
    pipe = tiny.pipeline(name, dtype=torch.float64)
    arguments = {**tiny.call_arguments(name, height=112), "output_type": "latent"}
    made = []
    for forecast in (False, True):
        config = ParallelConfig(patch_rows=(3, 2, 2), warmup="coarse", forecast=forecast, split_batch=False)
        patchpipe.parallelize(pipe, config)
        made.append(tiny.painted(pipe(**arguments, generator=torch.Generator().manual_seed(0))))
        patchpipe.restore(pipe)
        with naive_pipefusion(pipe, (3, 2, 2), 0, forecast=forecast, coarse=True):
            naive = tiny.painted(pipe(**arguments, generator=torch.Generator().manual_seed(0)))
        torch.testing.assert_close(made[-1] / naive.std(), naive / naive.std(), rtol=1e-10, atol=1e-10)
    plain = tiny.painted(pipe(**arguments, generator=torch.Generator().manual_seed(0)))
    assert (plain - naive).abs().max() > 1e-3 * naive.std(), "staleness changes nothing here: nothing was tested"


# -- what it is asked with -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distrifusion": 2}, "is for patches that stream; distrifusion has none"),
        ({"pipefusion": 2, "ulysses": 2}, "is not supported with compile=True, ulysses or ring"),
        ({"pipefusion": 2, "compile": True}, "is not supported with compile=True, ulysses or ring"),
        ({"pipefusion": 2, "share_blocks": True}, "needs a synchronous step to begin with"),
        ({"pipefusion": 2, "warmup": "course"}, 'or "all" to run every step synchronously, or "coarse"'),
    ],
)
def test_layouts_without_one_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ParallelConfig(**{"warmup": "coarse", **options})


def test_the_planner_counts_it_ahead_of_the_first_patch() -> None:
    """Two stages, two patches of a second a stage: ten steps, and a sample of half a second that fills the pipe."""
    patch, whole = Unit((1.0, 1.0), (1.0, 1.0), (0.0, 0.0)), Unit((2.0, 2.0), (2.0, 2.0), (0.0, 0.0))
    sample = Unit((0.5, 0.5), (0.5, 0.5), (0.0, 0.0))
    coarse = total([whole], [patch] * 2, 0, 10, ahead=[[sample]])
    assert coarse.seconds == 0.5 + total([whole], [patch] * 2, 0, 10).seconds
    assert coarse.seconds < total([whole], [patch] * 2, 1, 10).seconds - 1
    assert coarse.worked == (20.5, 20.5)
