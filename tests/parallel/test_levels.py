"""Ulysses over links of two speeds: the exchange on two levels, heads in turns, values first."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.distributed import joining
from patchpipe.errors import RankLost
from patchpipe.layout.axes import Mesh
from patchpipe.layout.communicators import count, lines_of
from patchpipe.layout.domains import check_alike, domains
from patchpipe.layout.volume import Volume, traffic
from patchpipe.models import plan_for
from patchpipe.models.latent import Raster
from patchpipe.parallel import ulysses as module
from patchpipe.parallel.sharing import ulysses_line
from patchpipe.parallel.ulysses import Ulysses
from patchpipe.stage.attending import Attend, Attending
from patchpipe.stage.keys.early import Early, check_values, parts_of
from patchpipe.stage.keys.store import LayerStore
from patchpipe.stage.patches import Cut
from patchpipe.stage.rows import Rows
from tests import tiny
from tests.support import parity
from tests.support.nccl_rules import over
from tests.support.ranks import Place
from tests.support.threads import run_threads

# -- the exchange --------------------------------------------------------------------------------

CHANNELS, BATCH, TEXT = 8, 2, 5


def attended(
    place: Place, inner: int, heads: int, tokens: int, turns: int | None, stored: bool
) -> tuple[Tensor, dict[str, int]]:
    """This rank's rows after one attention, and the bytes it sent, by line."""
    config = ParallelConfig(ulysses=place.world_size, ulysses_inner=inner)
    group = place.join(config)
    raster = Raster(count=tokens, tokens=1, units=1)
    cut, sizes = Cut.of(raster, config, TEXT), {"text": TEXT, "image": tokens}
    pieces, rows = cut.split(cut.whole, place.world_size), Rows.of(("text", "image"), sizes, raster)
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(3, BATCH, heads, rows.total, CHANNELS, generator=generator)
    own = [rows.part(each, pieces, 2)[place.rank] for each in whole]
    store = LayerStore(rows) if stored else None
    sharing = Ulysses(ulysses_line(group), cut.whole, pieces, turns)
    layer = Attending(pieces[place.rank], store, sharing, rows)
    made = sharing.attend(Attend(functional.scaled_dot_product_attention), own[0], own[1], own[2], layer)
    return made, {name: line.sent_bytes for name, line in group.lines.items()}


@pytest.mark.some(of=3)
@pytest.mark.parametrize(("ranks", "inner", "transport"), [(4, 2, "gloo"), (8, 2, "nccl"), (8, 4, "gloo")])
def test_two_levels_give_what_one_gives_to_the_bit(ranks: int, inner: int, transport: str) -> None:
    """Rows and heads that do not divide; heads in turns; keys and values stored or not."""
    with over(transport):
        flat = run_threads(ranks, attended, 1, 11, 19, None, False)
        for turns, stored in ((None, False), (2, False), (2, True)):
            made = run_threads(ranks, attended, inner, 11, 19, turns, stored)
            for (right, _), (found, sent) in zip(flat, made, strict=True):
                assert torch.equal(found, right), (turns, stored)
                assert set(sent) == {"ulysses_inner", "ulysses_outer"}


@pytest.mark.parametrize("turns", [1, 3])
def test_bytes_over_each_kind_of_link_are_those_of_the_formula(turns: int) -> None:
    """Of what it gives, a rank sends (I-1)/I inside its domain and (O-1)/O to other domains."""
    ranks, inner, heads, tokens = 8, 2, 24, 59
    attending = (tokens + TEXT) * heads * CHANNELS * BATCH * 4
    volume = Volume(tokens=tokens + TEXT, width=heads * CHANNELS * BATCH, attended=tokens + TEXT, summed=0, itemsize=4)
    shape = ParallelConfig(ulysses=ranks).mesh_shape
    found = run_threads(ranks, attended, inner, heads, tokens, turns, False)
    sent = [sum(each[name] for _, each in found) for name in ("ulysses_inner", "ulysses_outer")]
    assert sent == [4 * attending * (inner - 1) // inner, 4 * attending * 3 // 4]
    told = traffic(shape, volume, inner)
    assert sent == [ranks * told["ulysses inside"], ranks * told["ulysses across"]]
    flat = sum(each["ulysses"] for _, each in run_threads(ranks, attended, 1, heads, tokens, turns, False))
    assert flat == ranks * traffic(shape, volume)["ulysses"] == 4 * attending * 7 // 8


def out_of_turn(place: Place) -> str:
    line = ulysses_line(place.join(ParallelConfig(ulysses=4, ulysses_inner=2)))
    own = torch.full((3,), float(place.rank))
    first, second = (line.trade([own + at] * 4, lambda _, __: (3,)) for at in (0, 10))
    with pytest.raises(RuntimeError, match="before one that was begun earlier"):
        second.take()
    assert [float(each[0]) for each in first.take()] == [0, 1, 2, 3]
    assert [float(each[0]) for each in second.take()] == [10, 11, 12, 13]
    with pytest.raises(RuntimeError, match="taken twice"):
        first.take()
    return "done"


def test_exchanges_are_taken_in_the_order_they_were_begun() -> None:
    assert run_threads(4, out_of_turn) == ["done"] * 4


def wait_for_the_late(place: Place) -> str:
    line = ulysses_line(place.join(ParallelConfig(ulysses=4, ulysses_inner=2, timeout=2)))
    if place.rank == 3:
        time.sleep(5)
        return ""
    with pytest.raises(RankLost) as caught:
        line.trade([torch.ones(2)] * 4, lambda _, __: (2,)).take()
    return str(caught.value)


def test_each_level_has_its_deadline() -> None:
    told = run_threads(4, wait_for_the_late)
    assert all("within 2 s" in text for text in told[:3]), told  # 1 waits across, 2 inside, 0 for 1


def test_lines_are_made_in_one_order_by_every_rank() -> None:
    shape = ParallelConfig(pipefusion=2, ring=2, ulysses=4, ulysses_inner=2).mesh_shape
    every = [lines_of(Mesh(shape, rank), 2) for rank in range(16)]
    assert {tuple(each) for each in every} == {("ring", "ulysses_inner", "ulysses_outer")}
    assert every[5] == {"ring": (1, 5), "ulysses_inner": (4, 5), "ulysses_outer": (5, 7)}
    assert all(each[name] == every[mate][name] for each in every for name in each for mate in each[name])
    assert count(Mesh(shape, 0), inner=2) == {
        "streams": 1, "predictions": 15 - 7, "ring": 1, "ulysses inner": 1, "ulysses outer": 1,
    }  # fmt: skip
    assert lines_of(Mesh((1, 1, 1, 1, 1, 4, 1), 0), 4) == {"ulysses": (0, 1, 2, 3)}  # one domain is no level


# -- requests ------------------------------------------------------------------------------------


def painted(place: Place, name: str, layouts: list[dict[str, Any]]) -> list[np.ndarray | None]:
    pipe, found = tiny.pipeline(name), []
    call = {**tiny.call_arguments(name, height=128), "num_inference_steps": 2}
    for layout in layouts:
        config = ParallelConfig(**layout)
        patchpipe.parallelize(pipe, config, group=place.join(config))
        made = parity.call_pipeline(pipe, call)
        found.append(None if made is None else np.asarray(tiny.painted(made)))
        patchpipe.restore(pipe)
    return found


CASES = [
    ("flux", {"ulysses": 4}),
    ("qwen-padded", {"pipefusion": 2, "ulysses": 4, "patches": 1}),  # masks, which the first layer exchanges
    ("pixart-4", {"pipefusion": 2, "ulysses": 4, "patches": 1, "forecast": True}),
    ("sd3", {"ring": 2, "ulysses": 4, "patches": 1}),
]


@pytest.mark.some(of=4)
@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_a_picture_is_the_same_to_the_bit(name: str, layout: dict[str, Any]) -> None:
    """Flat, on two levels, values first on either; heads in turns as soon as there are several."""
    layouts = [
        {**layout, "ulysses_inner": inner, "values_first": first} for inner, first in ((1, False), (2, True), (1, True))
    ]
    world_size = ParallelConfig(**layouts[0]).world_size
    with over("nccl"), mock.patch.object(module, "TURN_BYTES", 1):
        right, *others = run_threads(world_size, painted, name, layouts)[0]
    assert right is not None
    assert all(np.array_equal(right, other) for other in others)


# -- values first --------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """A layer as diffusers has them, and what its processor does to values after it has projected them."""

    heads = 4

    def __init__(self, spoil: str = "") -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(16, 16) for _ in range(3))
        generator = torch.Generator().manual_seed(5)  # the process's own is shared by ranks that are threads
        for parameter in self.parameters():
            parameter.requires_grad_(False).normal_(generator=generator)
        self.spoil, self.asked = spoil, []
        for name in ("to_q", "to_k", "to_v"):
            module = getattr(self, name)
            module.forward = partial(self.noting, name, module.forward)

    def noting(self, name: str, compute: Any, rows: Tensor) -> Tensor:
        self.asked.append(name)
        return compute(rows)

    def forward(self, rows: Tensor) -> Tensor:
        query = self.to_q(rows)
        if self.spoil == "rows":
            rows.mul_(2)
        key, value = self.to_k(rows), self.to_v(rows)
        if self.spoil == "values":
            value.mul_(2)
        parts = [each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (query, key, value)]
        return functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


def through_layer(place: Place, spoil: str, first: bool, inference: bool) -> tuple[Any, list[str]]:
    from patchpipe.stage.attention import attend_through, override

    group = place.join(ParallelConfig(ulysses=2, timeout=5))
    raster = Raster(count=6, tokens=1, units=1)
    cut = Cut.of(raster, group.config)
    pieces, rows = cut.split(cut.whole, 2), Rows.of(("image",), {"image": 6}, raster)
    layer = Layer(spoil)
    early = Early(layer, parts_of(layer, ("image",))) if first else None
    if early is not None:
        early.hook(override)
    sharing = Ulysses(group.lines["ulysses"], cut.whole, pieces)
    attend_through(layer, lambda: Attending(pieces[place.rank], None, sharing, rows), early=early)
    made: Any = None
    with torch.inference_mode(inference), torch.no_grad():
        given = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))[:, 3 * place.rank :][:, :3]
        try:
            for _ in range(2):  # the first shows that queries and values are made of the same rows
                layer.asked.clear()
                made = layer(given.clone())
        except RuntimeError as error:
            made = str(error)
    return made, layer.asked


@pytest.mark.parametrize("inference", [False, True])
def test_values_go_first_and_nothing_changes(inference: bool) -> None:
    plain, early = (run_threads(2, through_layer, "", first, inference) for first in (False, True))
    assert all(torch.equal(one[0], other[0]) for one, other in zip(plain, early, strict=True))
    assert plain[0][1] == ["to_q", "to_k", "to_v"]
    assert early[0][1] == (["to_q", "to_k", "to_v"] if inference else ["to_v", "to_q", "to_k"])  # no versions there


@pytest.mark.parametrize(
    ("spoil", "inference", "text"),
    [
        ("values", False, "changed its values after it had projected them"),
        ("values", True, "changed its values after it had projected them"),
        ("rows", False, "made its values of other rows than its queries"),
    ],
)
def test_values_that_change_after_they_were_sent_are_an_error(spoil: str, inference: bool, text: str) -> None:
    for made, _ in run_threads(2, through_layer, spoil, True, inference):
        assert isinstance(made, str), "it went unnoticed"
        assert text in made
        assert "leave values_first out" in made


def test_models_whose_values_cannot_go_first_are_refused_beforehand() -> None:
    for name in ("lumina2", "mochi"):  # heads of values that are repeated; entries one by one
        pipe = tiny.pipeline(name)
        with pytest.raises(ValueError, match=r"values_first=True is not supported for .*Leave it out"):
            check_values(pipe.transformer, plan_for(pipe.transformer))


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ({"ulysses": 8, "ulysses_inner": 3}, "ulysses_inner=3 does not divide ulysses=8.*use 1 or 2 or 4 or 8"),
        ({"ulysses_inner": 2}, "ulysses_inner=2 does not divide ulysses=1"),
        ({"ulysses": 4, "ulysses_inner": 0}, "ulysses_inner=0 must be a whole number of 1 or more"),
        ({"values_first": True}, "values_first=True is for the exchange of ulysses"),
        ({"ulysses": 2, "values_first": True, "compile": True}, "hides where values are projected"),
        ({"ulysses": 2, "values_first": 1}, "values_first=1 must be True or False"),
    ],
)
def test_layouts_that_make_no_sense_are_refused(layout: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ParallelConfig(**layout)


def join_from(place: Place, config: ParallelConfig) -> str:
    try:
        place.join(config)
    except ValueError as error:
        return str(error)
    return "joined"


def test_domains_that_are_not_alike_are_refused_on_every_rank_with_one_message() -> None:
    config = ParallelConfig(ulysses=4, ulysses_inner=2)
    hosts = dict(zip((f"rank {rank}" for rank in range(4)), "abbb", strict=True))
    with mock.patch.object(joining, "host_name", side_effect=lambda: hosts[threading.current_thread().name]):
        told = run_threads(4, join_from, config)
    assert len(set(told)) == 1
    assert "ranks 0, 1 are on host 1 and host 2, but ranks 2, 3 are on host 2" in told[0]


def test_domains_are_neighbours_of_a_line() -> None:
    shape = ParallelConfig(pipefusion=2, ulysses=4, tensor=2).mesh_shape
    assert domains(shape, 2) == [(0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 14), (13, 15)]
    check_alike(shape, 2, "aaaabbbbccccdddd")
    check_alike(shape, 2, "abababababababab")  # racks of one fast domain: all span hosts alike
    with pytest.raises(ValueError, match="not alike"):
        check_alike(shape, 2, "aaaabbbbccccdddx")
