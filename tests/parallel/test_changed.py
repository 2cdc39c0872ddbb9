"""Ulysses that exchanges only changed tokens, against a naive telling of it row by row, and against plain Ulysses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import patchpipe
from bench.lossy import decibels, paint, pipelines
from patchpipe import ParallelConfig
from patchpipe.demo import held_out
from patchpipe.layout.axes import shares
from patchpipe.layout.volume import Volume, traffic
from patchpipe.models import plan_for
from patchpipe.models.latent import Raster
from patchpipe.parallel.lossy.moving import MovingRows
from patchpipe.parallel.lossy.ulysses import ChangedLayer, ChangedUlysses, Moment
from patchpipe.parallel.refusals import check_special
from patchpipe.parallel.sharing import ulysses_line
from patchpipe.pipeline.streams.lanes import check_whole
from patchpipe.stage.attending import Attend, Attending
from patchpipe.stage.patches import Cut
from patchpipe.stage.rows import Rows
from tests import tiny
from tests.support import parity
from tests.support.nccl_rules import over
from tests.support.ranks import Place, run_ranks
from tests.support.threads import run_threads

CHANNELS, BATCH, TEXT, HEADS, TOKENS = 4, 2, 3, 7, 13
LEVELS = (1.0, 0.9, 0.7, 0.7, 0.45, 0.1)  # one comes twice, as with second-order schedulers

# -- one layer -----------------------------------------------------------------------------------


def moving_rows(heads: int = HEADS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys and values of every step: ``[3, batch, heads, rows, channels]``, on lines of their own, with noise.

    Some heads have far more noise, so that a forecast is of no use there.
    """
    generator = torch.Generator().manual_seed(7)
    shape = (3, BATCH, heads, TEXT + TOKENS, CHANNELS)
    start, way = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    way *= torch.rand(shape[3], 1, generator=generator, dtype=torch.float64) * 3
    noise = torch.tensor([0.02, 2.0] * heads, dtype=torch.float64)[:heads, None, None]
    return [
        (start + level * way + noise * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for level in LEVELS
    ]


def through_steps(
    place: Place, inner: int, share: float, forecast: bool, steps: list[Tensor]
) -> tuple[list[Tensor], dict[str, int]]:
    """This rank's rows of the result of every step, and the bytes it sent."""
    ranks, group = place.world_size, place.join(ParallelConfig(ulysses=place.world_size, ulysses_inner=inner))
    cut, rows = sequence(group.config)
    pieces, made = cut.split(cut.whole, ranks), []
    layers: list[ChangedLayer] = []
    for number, (level, whole) in enumerate(zip(LEVELS, steps, strict=True)):
        own = [rows.part(each, pieces, 2)[place.rank] for each in whole]
        moment = Moment.of(level, share, synchronous=number == 0, forecast=forecast)
        sharing = ChangedUlysses(ulysses_line(group), cut.whole, pieces, layers, moment)
        layer = Attending(pieces[place.rank], None, sharing, rows)
        made.append(sharing.attend(Attend(functional.scaled_dot_product_attention), own[0], own[1], own[2], layer))
    assert len(layers) == 1
    return made, {name: line.sent_bytes for name, line in group.lines.items()}


def sequence(config: ParallelConfig) -> tuple[Cut, Rows]:
    raster = Raster(count=TOKENS, tokens=1, units=1)
    return Cut.of(raster, config, TEXT), Rows.of(("text", "image"), {"text": TEXT, "image": TOKENS}, raster)


class Told:
    """What is known of one row in one head: what was told, and when."""

    def __init__(self) -> None:
        nothing = torch.zeros(CHANNELS, dtype=torch.float64)
        self.last, self.level, self.rate = nothing, math.inf, nothing

    def tell(self, row: Tensor, level: float) -> None:
        if level != self.level < math.inf:
            self.rate = (row - self.last) / (level - self.level)
        self.last, self.level = row, level

    def change(self, level: float) -> Tensor:
        return self.rate * (level - self.level) if self.rate.any() else self.rate


def worth(told: list[Told], true: list[Tensor], level: float) -> bool:
    """Whether at least a quarter of the forecast change came true."""
    changes = [one.change(level) for one in told]
    met = sum(float(change @ (row - one.last)) for change, row, one in zip(changes, true, told, strict=True))
    return met > sum(float(change @ change) for change in changes) / 4


def naive(ranks: int, share: float, forecast: bool, steps: list[Tensor]) -> list[Tensor]:
    """All rows of the result of every step, row by row, with no exchange and no batch."""
    cut, rows = sequence(ParallelConfig(ulysses=ranks))
    owned = [part.tolist() for part in rows.part(torch.arange(rows.total), cut.split(cut.whole, ranks), 0)]
    heads = [range(*span) for span in shares(steps[0].shape[2], ranks)]
    every = [(row, head) for row in range(rows.total) for head in range(steps[0].shape[2])]
    row_of = {row: rank for rank, own in enumerate(owned) for row in own}
    rank_of = {head: rank for rank, own in enumerate(heads) for head in own}
    made = [torch.zeros_like(step[0]) for step in steps]
    for entry in range(BATCH):
        keys, values, mirror, results = ({pair: Told() for pair in every} for _ in range(4))
        for number, (level, step) in enumerate(zip(LEVELS, steps, strict=True)):
            query, key, value = step[:, entry].unbind(0)
            now = share * (1.5 * level + 0.5 * (1 - level)) if number else 1.0
            trusted = {
                (rank, head): forecast
                and worth([mirror[row, head] for row in own], [value[head, row] for row in own], level)
                for rank, own in enumerate(owned)
                for head in rank_of
            }
            chosen: set[int] = set()
            for rank, own in enumerate(owned):
                missed = dict.fromkeys(own, 0.0)
                for row, head in ((row, head) for row in own for head in rank_of if number and rank_of[head] != rank):
                    told = mirror[row, head]
                    shown = told.last + (told.change(level) if trusted[rank, head] else 0)
                    missed[row] += float((value[head, row] - shown).abs().sum())
                count = min(len(own), max(1, math.ceil(min(1.0, now) * len(own))))
                chosen |= set(sorted(own, key=lambda row: -missed[row])[:count])
            for head, rank in rank_of.items():
                seen = []
                for known, true in ((keys, key[head]), (values, value[head])):
                    own = owned[rank]
                    ahead = forecast and worth([known[row, head] for row in own], [true[row] for row in own], level)
                    for row in {*chosen, *own}:
                        known[row, head].tell(true[row], level)
                    change = [known[row, head].change(level) if ahead else 0 for row in range(rows.total)]
                    seen.append(torch.stack([known[row, head].last + change[row] for row in range(rows.total)]))
                weights = torch.softmax(query[head] @ seen[0].T / CHANNELS**0.5, -1)
                for row, result in enumerate(weights @ seen[1]):
                    told, fresh = results[row, head], row in chosen or row_of[row] == rank
                    if row in chosen:
                        told.tell(result, level)
                        mirror[row, head].tell(value[head, row], level)
                    on = told.change(level) if trusted[row_of[row], head] and not fresh else 0
                    made[number][entry, head, row] = result if fresh else told.last + on
    return made


@pytest.mark.parametrize("forecast", [False, True])
@pytest.mark.parametrize(("ranks", "inner", "transport"), [(2, 1, "nccl"), (3, 1, "gloo"), (4, 2, "gloo")])
def test_a_layer_is_as_told_row_by_row(ranks: int, inner: int, transport: str, forecast: bool) -> None:
    """Rows and heads that do not divide; a noise level that comes twice; heads in which a forecast is of no use."""
    steps, share = moving_rows(), 0.4
    with over(transport):
        found = [made for made, _ in run_threads(ranks, through_steps, inner, share, forecast, steps)]
    right = naive(ranks, share, forecast, steps)
    cut, rows = sequence(ParallelConfig(ulysses=ranks))
    pieces = cut.split(cut.whole, ranks)
    for number, expected in enumerate(right):
        whole = rows.join([made[number] for made in found], pieces, 2)
        torch.testing.assert_close(whole, expected, rtol=1e-9, atol=1e-9)
    exact = [functional.scaled_dot_product_attention(*step.unbind(0)) for step in steps]
    assert not torch.allclose(right[-1], exact[-1], atol=1e-3)  # else nothing was left out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_of_one_is_plain_ulysses_to_the_bit(dtype: torch.dtype) -> None:
    steps = moving_rows(dtype=dtype)
    found = [made for made, _ in run_threads(3, through_steps, 1, 1.0, True, steps)]
    cut, rows = sequence(ParallelConfig(ulysses=3))
    for number, step in enumerate(steps):
        whole = rows.join([made[number] for made in found], cut.split(cut.whole, 3), 2)
        by_rank = [
            functional.scaled_dot_product_attention(*step[:, :, low:high].unbind(0)) for low, high in shares(7, 3)
        ]
        assert torch.equal(whole, torch.cat(by_rank, 1))


@pytest.mark.parametrize(("ranks", "inner"), [(2, 1), (4, 2)])
def test_bytes_are_those_of_the_formula(ranks: int, inner: int) -> None:
    """Of every rank's rows a share, four activations each in other ranks' heads, and the number of each row."""
    steps, share, item = moving_rows(heads=8, dtype=torch.bfloat16), 0.5, 2
    found = run_threads(ranks, through_steps, inner, share, False, steps)
    sent = sum(sum(each.values()) for _, each in found)
    cut, rows = sequence(ParallelConfig(ulysses=ranks))
    lengths = [rows.count(piece) for piece in cut.split(cut.whole, ranks)]
    counts = [sum(lengths)] + [
        sum(min(own, math.ceil(min(1.0, share * (level + 0.5)) * own)) for own in lengths) for level in LEVELS[1:]
    ]
    crossed = (ranks - 1) if inner == 1 else (ranks - inner) + (inner - 1) * ranks // inner  # what levels hand on too
    row, number = 4 * BATCH * 8 * CHANNELS * item, 4 * BATCH
    assert sent == sum(counts) * row * crossed // ranks + sum(counts[1:]) * number * crossed
    if inner == 1:
        volume = Volume(rows.total, BATCH * 8 * CHANNELS, rows.total, 0, item)
        told = traffic(ParallelConfig(ulysses=ranks).mesh_shape, volume, 1, sum(counts) / rows.total / len(counts))
        assert told["ulysses"] * ranks * len(counts) == pytest.approx(sum(counts) * row * crossed / ranks)


def test_the_share_falls_and_its_mean_is_what_was_asked_for() -> None:
    levels = [1 - step / 19 for step in range(20)]
    sent = [Moment.of(level, 0.4, synchronous=False, forecast=True).share or 0.0 for level in levels]
    assert sent == sorted(sent, reverse=True)
    assert sum(sent) / 20 == pytest.approx(0.4)
    assert sent[0] == pytest.approx(0.6)
    assert Moment.of(0.9, 1.0, synchronous=False, forecast=True).count(5) == 5
    assert Moment.of(0.1, 0.01, synchronous=False, forecast=True).count(5) == 1
    assert Moment.of(0.1, 0.01, synchronous=True, forecast=True).count(5) == 5


def test_rows_on_a_line_are_forecast_exactly_and_others_not_at_all() -> None:
    """One head moves on as before, the other turns round."""
    start, way = torch.randn(2, 1, 2, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows, some = MovingRows(forecast=True), torch.tensor([[1, 4]])
    rows.fill(start, 1.0)
    rows.fill(start + way, 0.9)
    ahead = start + 2.5 * way
    turned = torch.cat([ahead[:, :1], (start - way)[:, 1:]], 1)
    moved = rows.worth(some, turned[:, :, [1, 4]], 0.75)
    assert moved is not None
    assert moved.flatten().tolist() == [True, False]
    shown = rows.shown(0.75, moved)
    torch.testing.assert_close(shown[:, :1], ahead[:, :1])
    assert torch.equal(shown[:, 1:], (start + way)[:, 1:])
    assert rows.bytes == 2 * start.nbytes + 6 * 8


# -- requests ------------------------------------------------------------------------------------


def painted(
    place: Place, name: str, layouts: list[dict[str, Any]], call: dict[str, Any], dtype: torch.dtype = torch.float32
) -> list[np.ndarray | None]:
    pipe, found = tiny.pipeline(name, dtype=dtype), []
    arguments = {**tiny.call_arguments(name, height=128), "num_inference_steps": 4, **call}
    for layout in layouts:
        config = ParallelConfig(**layout)
        patchpipe.parallelize(pipe, config, group=place.join(config))
        for _ in range(2):  # a request leaves nothing behind
            made = parity.call_pipeline(pipe, arguments)
        found.append(None if made is None else np.asarray(tiny.painted(made)))
        assert pipe.patchpipe.last.store_bytes > 0 or config.synchronous or config.changed_tokens is None
        patchpipe.restore(pipe)
    return found


@pytest.mark.some(of=4)
@pytest.mark.parametrize("name", ["flux", "sd3", "qwen-padded", "pixart-4"])
def test_a_share_of_one_paints_the_same_to_the_bit(name: str) -> None:
    """Guidance in one call and in two, padding masked, text apart; and with a smaller share another picture."""
    share = {"ulysses": 2, "changed_tokens": 1.0}
    layouts = [{"ulysses": 2}, share, {**share, "forecast": True}, {**share, "changed_tokens": 0.3, "warmup": "all"}]
    layouts.append({**share, "changed_tokens": 0.5, "forecast": True, "warmup": 2})
    right, *same, near = run_threads(2, painted, name, layouts, {})[0]
    assert right is not None
    assert all(np.array_equal(right, other) for other in same)
    assert not np.array_equal(right, near)


@pytest.mark.some(of=2)
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("sd3", {"cfg": 2}),
        ("flux", {"data": 2}),
        ("sd3", {"ulysses_inner": 2, "ulysses": 4}),
        ("flux", {"offload": "auto"}),
    ],
    ids=str,
)
def test_other_methods_do_not_change_the_picture(name: str, layout: dict[str, Any]) -> None:
    """Ranks of their own for branches or pictures, links of two speeds, weights that come and go."""
    base = {"ulysses": layout.get("ulysses", 2), "changed_tokens": 0.5, "forecast": True, "warmup": 1}
    both = [base, {**base, **layout}]
    call = {"num_images_per_prompt": 2} if "data" in layout else {}
    right, found = (
        run_threads(ParallelConfig(**one).world_size, painted, name, [one], call, torch.float64)[0][0] for one in both
    )
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-6 * np.abs(right).max())


@pytest.mark.extra
def test_processes_paint_what_threads_do() -> None:
    layouts = [{"ulysses": 2, "changed_tokens": 0.4, "forecast": forecast} for forecast in (False, True)]
    threads, processes = (run(2, painted, "flux", layouts, {})[0] for run in (run_threads, run_ranks))
    assert all(np.array_equal(one, other) for one, other in zip(threads, processes, strict=True))
    assert not np.array_equal(*threads)


@pytest.mark.extra
def test_the_bundled_model_paints_nearly_the_same_with_half_of_its_tokens() -> None:
    """A forecast of the others is worth many decibels; random tiny models do not move on lines."""
    pipes, half = pipelines(2), {"ulysses": 2, "changed_tokens": 0.5}
    [(right, _, _)] = paint(None, pipes, held_out()[:1], 20, [{}])
    found = run_threads(2, paint, pipes, held_out()[:1], 20, [{**half, "forecast": False}, half])[0]
    [frozen], [forecast] = (decibels(right, pictures) for pictures, _, _ in found)
    assert forecast > 45
    assert forecast > frozen + 6


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ({"ulysses": 1}, "changed_tokens=0.5 is for the exchange of ulysses"),
        ({"changed_tokens": 0}, "changed_tokens=0 must be a share"),
        ({"changed_tokens": 1.5}, "changed_tokens=1.5 must be a share"),
        ({"changed_tokens": True}, "changed_tokens=True must be a share"),
        ({"pipefusion": 2}, "not tested with pipefusion and so refused"),
        ({"ring": 2}, "not tested with ring"),
        ({"tensor": 2}, "not tested with tensor"),
        ({"patches": 4}, "not tested with patches"),
        ({"patch_rows": (2, 2)}, "not tested with patch_rows"),
        ({"values_first": True}, "not tested with values_first"),
        ({"compile": True}, "not tested with compile"),
        ({"split_batch": True}, "not tested with split_batch"),
        ({"warmup": 0}, "not tested with warmup=0"),
        ({"warmup": "streamed"}, "not tested with warmup='streamed'"),
    ],
)
def test_layouts_that_make_no_sense_are_refused(layout: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ParallelConfig(**{"ulysses": 2, "changed_tokens": 0.5, **layout})


def test_what_nothing_tests_is_refused() -> None:
    config = ParallelConfig(ulysses=2, changed_tokens=0.5)
    with pytest.raises(ValueError, match=r"changed_tokens=0\.5 has not been tested with"):
        check_special(plan_for(tiny.pipeline("mochi").transformer), config)
    with pytest.raises(ValueError, match="cannot change its number of ranks"):
        check_whole(config)
    assert "changed tokens 0.5" in config.describe()
    assert ParallelConfig(**config.as_dict()) == config


def test_what_is_kept_can_go_elsewhere() -> None:
    layer = ChangedLayer(forecast=True)
    for rows in (layer.keys, layer.values, layer.told, layer.results):
        rows.fill(torch.ones(1, 2, 3, 4), 1.0)
    before = layer.bytes
    layer.move(torch.device("cpu"))
    assert layer.bytes == before == 4 * (2 * 24 * 4 + 3 * 8)
