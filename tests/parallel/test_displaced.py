"""DistriFusion on real processes, against a naive one-process telling of it that shares no code with patchpipe."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

import patchpipe
from patchpipe import ParallelConfig, PatchpipeError
from patchpipe.models.latent import Raster
from patchpipe.parallel.displaced import Displaced, displaced_for
from patchpipe.schedule.branches import Branch
from patchpipe.stage.attending import Attend, Attending
from patchpipe.stage.patches import Cut
from tests import tiny
from tests.support.nccl_rules import over
from tests.support.ranks import Place, quieten, run_ranks
from tests.support.sequences import sequence_of
from tests.support.threads import run_threads

MODELS = ("flux", "sd35", "pixart")
WARMUPS: dict[int, tuple[Any, ...]] = {2: (0, 1, 2, "all"), 3: (0, 1, 2, "all"), 4: (1, "all")}
SIZES = ((112, 48), (80, 64))  # 7 rows of 3 tokens, then 5 rows of 4: neither divides by 2 or 3
IMAGES, STEPS, LAYERS, ITEM = 2, 3, 4, 8
LONGER = 10  # steps, fine enough that tiny models' keys move in lines
ENTRIES = 2 * IMAGES  # of the batch in one step, both branches of guidance counted
WIDTH = {"flux": 32, "sd35": 32, "pixart": 48}
ANSWER = {"flux": 16, "sd35": 16, "pixart": 32}  # numbers of the prediction for one token
LAYOUTS: dict[int, list[dict[str, int]]] = {
    2: [{"distrifusion": 2}],
    3: [{"distrifusion": 3}],
    4: [{"cfg": 2, "distrifusion": 2}, {"data": 2, "distrifusion": 2}],
}

Table = dict[int, list[Tensor]]  # by attention layer, in the order they run: keys and values


def setup_module() -> None:
    quieten()


# -- the oracle: for every part the whole transformer runs on the whole latent, and its rows are kept ---------------


class _Pass(TorchFunctionMode):
    """The self-attention of one pass: keys and values of all rows but the part's own are those of the step before.

    Args:
        before: What the step before computed; empty if there was none.
        changes: How it differs from the one before, and how far on the noise level has gone since; of a forecast.
        after: Where this pass leaves its own rows for the next step.
        part: Which part of how many.
        image: Which image tokens are its own.
        tokens: Image tokens of the latent.
        text_first: Whether text rows come before the image's.
        adapted: Whether layers attend once more, to the picture and an IP-Adapter's.
    """

    def __init__(
        self,
        before: Table,
        changes: tuple[Table, float],
        after: Table,
        part: tuple[int, int],
        image: Tensor,
        tokens: int,
        text_first: bool,
        adapted: bool = False,
    ) -> None:
        super().__init__()
        self.changes, self.ahead = changes
        self.before, self.after, self.part, self.image = before, after, part, image
        self.tokens, self.text_first, self.adapted = tokens, text_first, adapted
        self.layer = -1
        self.text_rows = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
        query, key, value = named.pop("query"), named.pop("key"), named.pop("value")
        if self.adapted and query.shape[2] == self.tokens < key.shape[2]:
            self.layer += 1
            mixed, _ = self._mixed(key[:, :, : self.tokens], value[:, :, : self.tokens])
            whole = [rows[:, :, self.tokens :] for rows in (key, value)]
            return func(query, *(torch.cat(pair, 2) for pair in zip(mixed, whole, strict=True)), **named)
        if query.shape[2] != key.shape[2]:  # cross-attention: the text does not change
            return func(*args, **(kwargs or {}))
        self.layer += 1
        rows, seen = self._mixed(key, value)
        if named.get("attn_mask") is not None:  # of keys, the same in every pass
            named["attn_mask"] = named["attn_mask"][..., seen]
        return func(query, *rows, **named)

    def _mixed(self, *computed: Tensor) -> tuple[list[Tensor], Tensor]:
        text_count = computed[0].shape[2] - self.tokens
        self.text_rows = max(self.text_rows, text_count)
        image_at, text_at = (text_count, 0) if self.text_first else (0, self.tokens)
        index, count = self.part
        own = torch.cat([image_at + self.image, text_at + torch.arange(text_count).tensor_split(count)[index]])
        kept = self.after.setdefault(self.layer, [torch.full_like(rows, torch.nan) for rows in computed])
        for rows, fresh in zip(kept, computed, strict=True):
            rows[:, :, own] = fresh[:, :, own]
        if not self.before:
            return [fresh[:, :, own] for fresh in computed], own
        mixed = [rows.clone() for rows in self.before[self.layer]]
        for rows, fresh, change in zip(mixed, computed, self.changes.get(self.layer, []), strict=False):
            came, moved = (fresh - rows)[:, :, own], change[:, :, own]
            worth = (came * moved).sum((2, 3)) > self.ahead * (moved * moved).sum((2, 3)) / 4  # of each head
            rows += torch.where(worth, self.ahead, 0.0)[:, :, None, None] * change
        for rows, fresh in zip(mixed, computed, strict=True):
            rows[:, :, own] = fresh[:, :, own]
        return mixed, torch.arange(computed[0].shape[2])


@contextmanager
def naive_distrifusion(
    pipe: Any, parts: int, warmup: int, rows: int, branches: int, forecast: bool = False
) -> Iterator[dict[str, int]]:
    """While it lasts, a request of a plain diffusers pipeline runs as DistriFusion would.

    Args:
        pipe: The pipeline.
        parts: Ranks there would be.
        warmup: Calls per guidance branch in which everything is fresh.
        rows: Rows of tokens of the picture.
        branches: Guidance branches that the pipeline computes in calls of their own, one after the other.
        forecast: Whether rows of other parts are shown where they will be.

    Yields:
        What the requests saw: their text rows in joint attention.
    """
    model = pipe.transformer
    packed = type(model).__name__ in ("FluxTransformer2DModel", "QwenImageTransformer2DModel")
    whole_forward = model.forward
    tables: list[Table] = [{} for _ in range(branches)]
    changes: list[Table] = [{} for _ in range(branches)]
    times: list[list[float]] = [[] for _ in range(branches)]
    calls, seen = 0, {"text": 0}

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        nonlocal calls
        dim = 1 if packed else 2
        units = torch.arange(hidden_states.shape[dim]).reshape(rows, -1)  # of the latent, by row of tokens
        tokens = torch.arange(rows * (units.shape[1] if packed else hidden_states.shape[3] // 2)).reshape(rows, -1)
        step, branch = divmod(calls, branches)
        calls += 1
        before, after, results = tables[branch], {}, []
        known = times[branch] = [*times[branch], float(kwargs["timestep"].max())][-3:]
        ahead = (known[2] - known[1]) / (known[1] - known[0]) if forecast and len(known) == 3 else 0.0
        count = parts if step >= warmup else 1  # where all is fresh, one part is as good as several
        for index, own in enumerate(torch.arange(rows).tensor_split(count)):
            moving = (changes[branch] if forecast else {}), ahead
            sizes = (index, count), tokens[own].flatten(), tokens.numel()
            attention = _Pass(before, moving, after, *sizes, packed, getattr(model, "image_proj", None) is not None)
            with attention:
                result = whole_forward(hidden_states, *args, **{**kwargs, "return_dict": False})[0]
            results.append(result.index_select(dim, units[own].flatten()))
            seen["text"] = max(seen["text"], attention.text_rows)
        changes[branch] = {layer: list(map(in_eight_bits, after[layer], before[layer])) for layer in before}
        tables[branch] = after
        return (torch.cat(results, dim=dim),)

    model.forward = forward
    try:
        yield seen
    finally:
        del model.forward


def in_eight_bits(now: Tensor, before: Tensor) -> Tensor:
    """The change of each row, in steps of the 127th part of its greatest number."""
    step = (now - before).abs().amax(-1, keepdim=True) / 126
    return torch.where(step == 0, 0.0, ((now - before) / step).round() * step)


# -- what the ranks do --------------------------------------------------------------------------------------------


def paint(pipe: Any, name: str, size: tuple[int, int], steps: int = STEPS) -> np.ndarray | None:
    arguments = tiny.call_arguments(name, height=size[0], width=size[1], steps=steps)
    generator = torch.Generator().manual_seed(5)
    output = pipe(**arguments, num_images_per_prompt=IMAGES, generator=generator, output_type="latent")
    return None if output is None else output.images.numpy()


def paint_all(place: Place) -> dict[tuple[Any, ...], Any]:
    """Two requests in a row of every model, layout and warm-up."""
    results = {}
    for name in MODELS:
        pipe = tiny.pipeline(name, dtype=torch.float64)
        for number, layout in enumerate(LAYOUTS[place.world_size]):
            for warmup in WARMUPS[place.world_size]:
                config = ParallelConfig(**layout, warmup=warmup, forecast=False, timeout=60)
                patchpipe.parallelize(pipe, config, group=place.join(config))
                for size in SIZES:
                    results[name, number, warmup, size] = (paint(pipe, name, size), pipe.patchpipe.last.as_dict())
                patchpipe.restore(pipe)
    return results


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def painted(request: pytest.FixtureRequest) -> tuple[int, list[dict[tuple[Any, ...], Any]]]:
    return request.param, run_threads(request.param, paint_all)


@pytest.fixture(scope="module")
def expected() -> Callable[..., tuple[np.ndarray, int]]:
    """What the oracle paints and the text rows it saw, computed once each; ``"all"`` is plain diffusers."""
    known: dict[tuple[Any, ...], tuple[np.ndarray, int]] = {}
    pipes = {name: tiny.pipeline(name, dtype=torch.float64) for name in MODELS}

    def find(name: str, parts: int, warmup: Any, size: tuple[int, int]) -> tuple[np.ndarray, int]:
        key = (name, 1 if warmup == "all" else parts, warmup, size)
        if key not in known:
            pipe = pipes[name]
            if warmup == "all":
                known[key] = (paint(pipe, name, size), 0)
            else:
                with naive_distrifusion(pipe, parts, warmup, size[0] // 16, 2 if name == "flux" else 1) as seen:
                    known[key] = (paint(pipe, name, size), seen["text"])
        return known[key]

    return find


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# -- what must hold -----------------------------------------------------------------------------------------------


@pytest.mark.some(of=3)
def test_ranks_compute_what_distrifusion_means(painted: Any, expected: Any) -> None:
    world_size, results = painted
    for (name, number, warmup, size), (image, _) in results[0].items():
        parts = LAYOUTS[world_size][number]["distrifusion"]
        reference, _ = expected(name, parts, warmup, size)
        assert distance(image, reference) <= 1e-10, (name, LAYOUTS[world_size][number], warmup, size)
        if warmup != "all":
            stale = distance(reference, expected(name, parts, "all", size)[0])
            assert stale > 1e-4, f"staleness moves the result by {stale} only: nothing was tested"


@pytest.mark.some(of=3, first=1)
def test_each_rank_sends_its_rows_and_its_answer_to_the_others(painted: Any, expected: Any) -> None:
    world_size, results = painted
    if world_size == 4:
        pytest.skip("counted without other axes")
    for rank, result in enumerate(results):
        for (name, _, warmup, size), (_, stats) in result.items():
            text = expected(name, world_size, 1, size)[1]
            image_own = len(np.array_split(np.arange(size[0] // 16), world_size)[rank]) * size[1] // 16
            text_own = len(np.array_split(np.arange(text), world_size)[rank])
            numbers = kv_numbers(name, image_own, text_own) + image_own * ANSWER[name]
            assert stats["sent_bytes"] == numbers * ITEM * ENTRIES * STEPS * (world_size - 1), (name, warmup)


@pytest.mark.extra
def test_each_rank_keeps_the_keys_and_values_of_the_whole_latent(painted: Any, expected: Any) -> None:
    world_size, results = painted
    for result in results:
        for (name, number, warmup, size), (_, stats) in result.items():
            layout = LAYOUTS[world_size][number]
            text = expected(name, layout["distrifusion"], 1, size)[1]
            whole = kv_numbers(name, size[0] * size[1] // 256, text) * ITEM * ENTRIES
            share = layout.get("cfg", 1) * layout.get("data", 1)
            assert stats["store_bytes"] == (0 if warmup == "all" else whole // share), (name, layout, warmup)


def kv_numbers(name: str, image: int, text: int) -> int:
    """Numbers in the keys and values of all layers; half of SD 3.5's blocks have a second, image-only attention."""
    rows = (image + text) * LAYERS + (image * LAYERS // 2 if name == "sd35" else 0)
    return 2 * rows * WIDTH[name]


@pytest.mark.some(of=3)
def test_only_the_warm_up_counts_as_synchronous(painted: Any) -> None:
    for (name, _, warmup, _), (_, stats) in painted[1][0].items():
        calls = 2 if name == "flux" else 1  # of one step
        fresh = STEPS if warmup == "all" else warmup
        assert (stats["steps_synchronous"], stats["steps_patched"]) == (fresh * calls, (STEPS - fresh) * calls)
        assert stats["materialisations"] == 1


# -- others' rows, forecast ---------------------------------------------------------------------------------------


def paint_ahead(place: Place, name: str, layout: dict[str, Any]) -> tuple[np.ndarray | None, int]:
    pipe = tiny.pipeline(name, dtype=torch.float64)
    config = ParallelConfig(**{"forecast": True, **layout}, timeout=60)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    return paint(pipe, name, SIZES[0], LONGER), pipe.patchpipe.last.store_bytes


@pytest.mark.some(of=3, first=1)
@pytest.mark.parametrize(("name", "ranks", "warmup"), [("flux", 3, 1), ("sd35", 2, 2), ("pixart", 2, 0)])
def test_a_forecast_of_the_others_rows_is_what_it_means(name: str, ranks: int, warmup: int) -> None:
    layout: dict[str, Any] = {"distrifusion": ranks, "warmup": warmup}
    with over("nccl"):
        image, held = run_threads(ranks, paint_ahead, name, layout)[0]
    pipe, made = tiny.pipeline(name, dtype=torch.float64), []
    for forecast in (False, True):
        branches, rows = 2 if name == "flux" else 1, SIZES[0][0] // 16
        with naive_distrifusion(pipe, ranks, warmup, rows, branches, forecast) as seen:
            made.append(paint(pipe, name, SIZES[0], LONGER))
    assert distance(image, made[1]) <= 1e-4  # of eight bits, in which a rounding may show
    assert distance(made[0], made[1]) > 1e-3, "nothing was forecast: nothing was tested"
    numbers = kv_numbers(name, SIZES[0][0] * SIZES[0][1] // 256, seen["text"])
    assert held > numbers * (ITEM + 1) * ENTRIES  # rows, and their changes


def test_a_forecast_of_the_others_rows_is_the_same_where_branches_run_apart() -> None:
    alone = run_threads(2, paint_ahead, "flux", {"distrifusion": 2})[0][0]
    assert np.array_equal(run_threads(4, paint_ahead, "flux", {"distrifusion": 2, "cfg": 2})[0][0], alone)


# -- time and failure ---------------------------------------------------------------------------------------------


def attend_three_times(place: Place) -> list[float]:
    """Seconds of each call of a layer, while the other rank comes a second late to the second call."""
    config = ParallelConfig(distrifusion=2, timeout=30)
    group, kept, seconds = place.join(config), Branch(), []
    cut = Cut.of(Raster(4, 1, 1), config)
    rows = torch.full((1, 1, 2, 8), float(place.rank))
    layer = Attending(cut.split(cut.whole, 2)[place.rank], None, None, sequence_of(cut.rows))
    for call in range(3):
        if call == 1 and place.rank == 1:
            time.sleep(1.5)
        sharing = displaced_for(group, cut, kept, synchronous=call == 0)
        assert isinstance(sharing, Displaced)
        started = time.perf_counter()
        sharing.attend(Attend(scaled_dot_product_attention), rows, rows, rows, layer)
        seconds.append(time.perf_counter() - started)
    group.lines["displaced"].wire.drain()
    group.lines["displaced"].wire.drain()  # nothing is left to wait for
    return seconds


def test_a_step_does_not_wait_for_the_rows_of_the_same_step() -> None:
    _, second, third = run_ranks(2, attend_three_times)[0]
    assert second < 0.7 < third, "the second call needs the others' first, the third their late second"


def lose_a_rank(place: Place) -> tuple[str, float]:
    """What rank 0 hears, and how soon, when rank 1 dies in its third step."""
    pipe = tiny.pipeline("pixart", dtype=torch.float64)
    config = ParallelConfig(distrifusion=2, timeout=60)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    if place.rank == 1:
        forward, calls = pipe.transformer.forward, []

        def dying(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                os._exit(1)
            return forward(*args, **kwargs)

        pipe.transformer.forward = dying
    started = time.monotonic()
    with pytest.raises(PatchpipeError) as caught:
        paint(pipe, "pixart", SIZES[0])
    return str(caught.value), time.monotonic() - started


def test_a_lost_rank_ends_the_request_within_seconds() -> None:
    text, seconds = run_ranks(2, lose_a_rank, mortal={1})[0]
    assert "rank 1" in text
    assert seconds < 20


def ask_too_much(place: Place) -> list[str]:
    texts = []
    for layout, size in (({"distrifusion": 4}, (48, 48)), ({"distrifusion": 2, "ulysses": 2}, SIZES[0])):
        pipe = tiny.pipeline("pixart")
        try:
            config = ParallelConfig(**layout)
            patchpipe.parallelize(pipe, config, group=place.join(config))
            paint(pipe, "pixart", size)
        except ValueError as error:
            texts.append(str(error))
    return texts


def test_what_cannot_be_is_refused_alike_on_every_rank() -> None:
    answers = run_ranks(4, ask_too_much)
    assert all(answer == answers[0] and len(answer) == 2 for answer in answers)
    assert "3 token rows cannot be shared by 4 ranks" in answers[0][0]
    assert "distrifusion" in answers[0][1]
