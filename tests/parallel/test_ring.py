"""Ring attention, alone and with the other axes: parity in float64, bytes on the wire, kernels, deadlines."""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.config import ALL_STEPS
from patchpipe.errors import RankLost
from patchpipe.kernels.lse import attend_with_lse
from patchpipe.models.latent import Raster
from patchpipe.parallel.ring import Merged, Ring
from patchpipe.stage.attending import Attend
from patchpipe.stage.keys.store import LayerStore
from patchpipe.stage.patches import Cut
from tests import tiny
from tests.support import parity
from tests.support.ranks import Place, run_ranks
from tests.support.sequences import sequence_of
from tests.support.threads import run_threads

TOLERANCE = 1e-10  # relative, in float64: sums are reordered
NAMES = ("flux", "sd35", "pixart")  # text first, text last beside image-only attention, no text
STEPS = 2
SYNCHRONOUS = {"warmup": ALL_STEPS}
WARM = {"patches": 2, "warmup": 1}
COLD = {"patches": 2, "warmup": 0}  # from the first step on, rows stream into a store that has none

Case = tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]  # pipeline, degrees, schedule, call
Painted = tuple[np.ndarray | None, int]  # latents on the output rank; bytes this rank sent around the ring


def rows(count: int) -> dict[str, Any]:
    """Call arguments for a picture of so many token rows, three tokens each."""
    return {"height": 16 * count, "width": 48}


def call(pipe: Any, name: str, arguments: dict[str, Any]) -> Any:
    settings = {**tiny.call_arguments(name, steps=STEPS), **arguments}
    return pipe(**settings, generator=torch.Generator().manual_seed(0), output_type="latent")


def paint(place: Place, cases: list[Case]) -> list[Painted]:
    """What every case paints on this rank, and what it sends around the ring."""
    painted: list[Painted] = []
    pipes = {name: tiny.pipeline(name, dtype=torch.float64) for name in {case[0] for case in cases}}
    for name, degrees, schedule, arguments in cases:
        pipe, config = pipes[name], ParallelConfig(**degrees, **parity.pinned(schedule, parity.rows_of(arguments)))
        patchpipe.parallelize(pipe, config, group=place.join(config))
        output = call(pipe, name, arguments)
        sent = pipe.patchpipe.group.lines["ring"].sent_bytes
        painted.append((None if output is None else output.images.numpy(), sent))
        patchpipe.restore(pipe)
    return painted


@functools.cache
def expected(name: str, schedule: tuple[tuple[str, Any], ...], arguments: tuple[tuple[str, Any], ...]) -> np.ndarray:
    """Plain diffusers where every step is synchronous, else one process that streams the same patches."""
    pipe = tiny.pipeline(name, dtype=torch.float64)
    if dict(schedule) != SYNCHRONOUS:
        patchpipe.parallelize(pipe, ParallelConfig(**parity.pinned(dict(schedule), parity.rows_of(dict(arguments)))))
    return call(pipe, name, dict(arguments)).images.numpy()


def errors(cases: list[Case], painted: list[Painted]) -> dict[str, float]:
    """Relative error of every case, as the output rank painted it."""
    found = {}
    for case, (latents, _) in zip(cases, painted, strict=True):
        name, _, schedule, arguments = case
        right = expected(name, tuple(schedule.items()), tuple(arguments.items()))
        assert latents is not None
        assert latents.dtype == right.dtype == np.float64
        found[str(case)] = float(np.abs(latents - right).max() / np.abs(right).max())
    return found


# -- parity and bytes ----------------------------------------------------------------------------


ITEM = 8  # bytes of a float64
WIDTHS = {"flux": 32, "sd35": 32, "pixart": 48}
# Text rows of every self-attention layer; SD3 joins CLIP's 32 and T5's 8, its dual layers see the image alone.
LAYERS = {"flux": [8] * 4, "sd35": [40] * 4 + [0] * 2, "pixart": [0] * 4}
CALLS_BY_BATCH = 2 * STEPS  # both guidance branches, in one call of two or two of one


def shares(total: int, parts: int) -> list[int]:
    return [len(share) for share in np.array_split(np.arange(total), parts)]


def formula(name: str, degree: int, patch_rows: list[int], place: int) -> int:
    """Bytes the rank at a place of a ring sends in a request: all rows but those of the rank after it."""
    elements = 0
    for text in LAYERS[name]:
        for index, count in enumerate(patch_rows):
            texts, images = shares(text if index == 0 else 0, degree), shares(count, degree)
            slices = [t + 3 * i for t, i in zip(texts, images, strict=True)]
            elements += 2 * (sum(slices) - slices[(place + 1) % degree]) * WIDTHS[name]
    return elements * ITEM * CALLS_BY_BATCH


@pytest.mark.some(of=2)
@pytest.mark.parametrize("degree", [2, 3])
def test_ring_is_exact_and_sends_all_rows_but_the_next_ranks(degree):
    cases = [(name, {"ring": degree}, schedule, rows(7)) for name in NAMES for schedule in (SYNCHRONOUS, WARM, COLD)]
    ranks = run_threads(degree, paint, cases)
    found = errors(cases, ranks[0])
    assert max(found.values()) <= TOLERANCE, found
    for index, (name, _, schedule, _) in enumerate(cases):
        if schedule != WARM:
            cut = [7] if schedule == SYNCHRONOUS else [3, 4]
            sent = [painted[index][1] for painted in ranks]
            assert sent == [formula(name, degree, cut, place) for place in range(degree)]


def test_a_ring_of_lines_with_more_ranks_than_heads_and_text_rows():
    arguments = {**rows(13), "max_sequence_length": 5}
    cases = [("flux", {"ring": 2, "ulysses": 3}, COLD, arguments)]
    found = errors(cases, run_threads(6, paint, cases)[0])
    assert max(found.values()) <= TOLERANCE, found


def test_even_slices_send_what_the_papers_formula_says():
    """2·(R-1)/R·p·h of every layer, of which each rank of a Ulysses line sends its heads (arXiv 2310.01889)."""
    tokens, width, layers = 8 * 3 + 8, WIDTHS["flux"], len(LAYERS["flux"])
    whole = 2 * tokens * width * layers * ITEM * CALLS_BY_BATCH
    degrees = [{"ring": 4}, {"ring": 2, "ulysses": 2}]
    cases = [("flux", each, schedule, rows(8)) for each in degrees for schedule in (SYNCHRONOUS, COLD)]
    ranks = run_threads(4, paint, cases)
    found = errors(cases, ranks[0])
    assert max(found.values()) <= TOLERANCE, found
    for painted in ranks:
        assert [sent for _, sent in painted] == [whole * 3 // 4] * 2 + [whole // 2 // 2] * 2


# -- kernels -------------------------------------------------------------------------------------

ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def tensors(dtype: torch.dtype, queries: int, keys: int, channels: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, length, channels).to(dtype) for length in (queries, keys, keys)]


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    weights = (query.double() @ key.double().mT * scale).softmax(-1)
    return weights @ value.double()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(1, 1, 5), (7, 13, 8), (33, 700, 72), (600, 35, 16), (5, 70, 513)])
def test_the_kernel_returns_its_log_sum(dtype, shape):
    query, key, value = tensors(dtype, *shape)
    result, lse = attend_with_lse(query, key, value, 0.3)
    assert (result.double() - attention(query, key, value, 0.3)).abs().max() <= ROUNDING[dtype]
    right = (query.double() @ key.double().mT * 0.3).logsumexp(-1)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (lse.double() - right).abs().max() <= (1e-13 if dtype == torch.float64 else 2e-4)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_parts_of_any_length_merge_to_the_whole(dtype):
    query, key, value = tensors(dtype, 9, 40, 24)
    key *= 6  # so that one part outweighs another by far
    merged = Merged(query, 0.5)
    for keys, values in zip(key.split([1, 0, 17, 22], 2), value.split([1, 0, 17, 22], 2), strict=True):
        merged.add(keys, values)
    assert merged.result.dtype == dtype
    assert (merged.result.double() - attention(query, key, value, 0.5)).abs().max() <= ROUNDING[dtype]


def test_rows_that_are_not_unbroken_memory_are_copied_first():
    query, key, value = tensors(torch.float64, 7, 11, 8)
    broken = [rows_of.mT.contiguous().mT for rows_of in (query, key, value)]
    torch.testing.assert_close(attend_with_lse(*broken)[0], scaled_dot_product_attention(query, key, value))


def test_no_heads_give_no_result():
    nothing = torch.empty(2, 0, 5, 8)
    merged = Merged(nothing)
    merged.add(nothing, nothing)
    assert merged.result.shape == nothing.shape


def test_a_device_without_a_kernel_is_refused():
    query, key, value = (rows_of.to("meta") for rows_of in tensors(torch.float32, 3, 3, 8))
    with pytest.raises(NotImplementedError, match="use ulysses"):
        attend_with_lse(query, key, value)


@pytest.mark.parametrize(
    ("asked", "text"),
    [({"causal": True}, "causal"), ({"dropout": 0.1}, "dropout"), ({"grouped": True}, "grouped heads")],
)
def test_what_the_kernels_would_ignore_is_refused(asked, text):
    nothing: Any = None
    attend = Attend(scaled_dot_product_attention, **asked)
    with pytest.raises(NotImplementedError, match=text):
        Ring.attend(nothing, attend, nothing, nothing, nothing, nothing)


# -- the store -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "text_first"), [(3, True), (3, False), (0, False)])
@pytest.mark.parametrize("warm", [True, False])
def test_the_store_tells_a_patchs_rows_from_the_others(text, text_first, warm):
    cut = Cut.of(Raster(count=7, tokens=2, units=2), ParallelConfig(patches=3))
    store, total = LayerStore(sequence_of(cut.rows, text, text_first)), text + cut.total_tokens
    if warm:
        store.keep(torch.full((1, 1, total, 1), -1.0), torch.full((1, 1, total, 1), -1.0))
    for patch in cut.patches:
        count = patch.token_count + (text if patch.carries_riders else 0)
        before = sum(key.shape[2] for key, _ in store.others(patch))
        fresh = torch.full((1, 1, count, 1), float(patch.index))
        key, _ = store.write(patch, fresh, fresh)
        others = [other for other, _ in store.others(patch)]
        assert before == sum(other.shape[2] for other in others) == key.shape[2] - count
        assert all((other != patch.index).all() for other in others)


# -- deadlines -----------------------------------------------------------------------------------


def wait_for_the_late(place: Place) -> tuple[float, str]:
    config = ParallelConfig(ring=2, timeout=2)
    exchange = place.join(config).lines["ring"]
    started = time.monotonic()
    if place.rank == 1:
        time.sleep(5)
        return 0.0, ""
    coming = exchange.pass_on(torch.ones(3, 4), (5, 4))
    posted = time.monotonic() - started
    with pytest.raises(RankLost) as caught:
        coming.take()
    with pytest.raises(RuntimeError, match="twice"):
        coming.take()
    return posted, str(caught.value)


def test_a_hop_starts_at_once_and_its_wait_ends_at_the_deadline():
    posted, text = run_ranks(2, wait_for_the_late)[0]
    assert posted < 1
    assert "did not answer within 2 s" in text
