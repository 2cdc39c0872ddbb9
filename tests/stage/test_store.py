"""The stale key/value store: which rows a patch sees, and how old they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patchpipe import ParallelConfig
from patchpipe.models.latent import Raster
from patchpipe.stage.keys.store import LayerStore
from patchpipe.stage.patches import Cut, Patch
from tests.support.sequences import sequence_of

IMAGE, TEXT = 6, 2
RASTER = Raster(IMAGE, 1, 1)
FIRST, SECOND, THIRD = Cut.of(RASTER, ParallelConfig(patch_rows=(1, 2, 3))).patches


def rows(*values: float) -> Tensor:
    """One number per row, in the layout of attention."""
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, -1, 1)


def seen(store: LayerStore, patch: Patch, *values: float) -> list[float]:
    key, value = store.write(patch, rows(*values), -rows(*values))
    assert torch.equal(key, -value)
    return key.flatten().tolist()


def test_without_warm_up_a_patch_sees_only_rows_that_exist_text_first() -> None:
    store = LayerStore(sequence_of(RASTER, TEXT))
    assert seen(store, FIRST, 91, 92, 1) == [91, 92, 1]
    assert seen(store, SECOND, 2, 3) == [91, 92, 1, 2, 3]
    assert seen(store, THIRD, 4, 5, 6) == [91, 92, 1, 2, 3, 4, 5, 6]
    assert seen(store, FIRST, 81, 82, 11) == [81, 82, 11, 2, 3, 4, 5, 6], "the others are one step stale"
    assert seen(store, SECOND, 12, 13) == [81, 82, 11, 12, 13, 4, 5, 6]


def test_without_warm_up_a_patch_sees_only_rows_that_exist_image_first() -> None:
    store = LayerStore(sequence_of(RASTER, TEXT, text_first=False))
    assert seen(store, FIRST, 1, 91, 92) == [1, 91, 92]
    assert seen(store, SECOND, 2, 3) == [1, 2, 3, 91, 92]
    assert seen(store, THIRD, 4, 5, 6) == [1, 2, 3, 4, 5, 6, 91, 92]
    assert seen(store, FIRST, 11, 81, 82) == [11, 2, 3, 4, 5, 6, 81, 82]
    assert seen(store, THIRD, 14, 15, 16) == [11, 2, 3, 14, 15, 16, 81, 82]


@pytest.mark.parametrize("text_first", [True, False])
def test_without_text_there_are_image_rows_alone(text_first: bool) -> None:
    store = LayerStore(sequence_of(RASTER, 0, text_first))
    assert seen(store, FIRST, 1) == [1]
    assert seen(store, SECOND, 2, 3) == [1, 2, 3]
    store.keep(rows(1, 2, 3, 4, 5, 6), -rows(1, 2, 3, 4, 5, 6))
    assert seen(store, THIRD, 14, 15, 16) == [1, 2, 3, 14, 15, 16]


@pytest.mark.parametrize("text_first", [True, False])
def test_a_patchs_rows_can_be_taken_and_put_into_another_store(text_first: bool) -> None:
    """Text rows go with the first patch; a column of a mask, which all heads share, goes with the keys."""
    whole, other = LayerStore(sequence_of(RASTER, TEXT, text_first)), LayerStore(sequence_of(RASTER, TEXT, text_first))
    make = torch.Generator().manual_seed(0)
    fresh = [torch.randn(2, heads, TEXT + IMAGE, width, generator=make) for heads, width in ((3, 4), (3, 5), (1, 1))]
    whole.keep(*fresh)
    other.keep(*(torch.zeros_like(tensor) for tensor in fresh))
    for patch in (FIRST, SECOND, THIRD):
        taken = whole.rows_of(patch)
        assert other.expected(patch) == (taken.numel(), taken.dtype)
        other.put(patch, taken)
    assert all(torch.equal(one, two) for one, two in zip(other._kept, fresh, strict=True))


@pytest.mark.parametrize("text_first", [True, False])
def test_after_a_synchronous_step_all_rows_exist(text_first: bool) -> None:
    store = LayerStore(sequence_of(RASTER, TEXT, text_first))
    text, image = [91, 92], [1, 2, 3, 4, 5, 6]
    whole = rows(*(text + image if text_first else image + text))
    store.keep(whole, -whole)
    given = [81, 82, 11] if text_first else [11, 81, 82]
    left = [2, 3, 4, 5, 6]
    assert seen(store, FIRST, *given) == ([81, 82, 11, *left] if text_first else [11, *left, 81, 82])


def test_the_store_writes_into_no_tensor_of_others() -> None:
    projections = torch.arange(8.0).reshape(1, 1, 8, 1).repeat(1, 1, 1, 2)  # key and value from one matrix
    kept = projections.clone()
    store = LayerStore(sequence_of(RASTER, TEXT))
    store.keep(projections[..., :1], projections[..., 1:])
    store.write(SECOND, rows(50, 51), rows(60, 61))
    assert torch.equal(projections, kept)


def test_a_wrong_number_of_rows_is_noticed() -> None:
    store = LayerStore(sequence_of(RASTER, TEXT))
    with pytest.raises(RuntimeError, match=r"patch 0 brought 1 rows .* expects 3: the model's plan does not fit"):
        store.write(FIRST, rows(1), rows(1))


def test_bytes_are_those_of_all_rows() -> None:
    store = LayerStore(sequence_of(RASTER, TEXT))
    assert store.bytes == 0
    seen(store, FIRST, 91, 92, 1)
    assert store.bytes == 2 * (TEXT + IMAGE) * 4
