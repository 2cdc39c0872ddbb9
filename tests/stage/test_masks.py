"""Masks on self-attention: padded prompts paint what they paint alone, however patches stream or are shared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

import patchpipe
from patchpipe import ParallelConfig, UnsupportedModel
from patchpipe.layout.combinations import TESTED
from patchpipe.loading.precheck import check_folder
from patchpipe.models import plan_for
from patchpipe.models.latent import Latent, Raster, sizes_by_shapes
from patchpipe.parallel.ring import Merged
from patchpipe.parallel.tensor import TensorPart
from patchpipe.stage.attending import Attend, Attending
from patchpipe.stage.attention import attend_through
from patchpipe.stage.keys.masks import key_column
from patchpipe.stage.keys.store import LayerStore
from patchpipe.stage.patches import Cut, Patch
from tests import tiny
from tests.parallel.test_displaced import naive_distrifusion
from tests.support import parity
from tests.support.ranks import quieten
from tests.support.sequences import sequence_of
from tests.support.threads import run_threads

NAME = "qwen-padded"
SCHEDULES: list[dict[str, Any]] = [{"warmup": "all"}, {"patches": 2, "warmup": 1}, {"patches": 2, "warmup": 0}]
TWO = [{degree: 2} for degree in ("pipefusion", "cfg", "data", "ulysses", "ring", "tensor")]
THREE = [{"ulysses": 3}, {"ring": 3}]
FOUR = [{"ring": 2, "ulysses": 2}, {"pipefusion": 2, "ring": 2}, {"pipefusion": 2, "tensor": 2}]
EIGHT = [dict.fromkeys(sorted(methods), 2) for methods in TESTED if len(methods) == 3]
WITH_DISTRIFUSION = [dict.fromkeys(sorted(methods), 2) for methods in TESTED if "distrifusion" in methods]


def setup_module() -> None:
    quieten()


# -- pipelines ---------------------------------------------------------------------------------------


@pytest.mark.some(of=3, first=1)
@pytest.mark.parametrize(
    ("layouts", "schedules"),
    [(TWO, SCHEDULES), (THREE, SCHEDULES), (FOUR, SCHEDULES[1:]), (EIGHT, SCHEDULES[1:2])],
    ids=["2", "3", "4", "8"],
)
def test_layouts_paint_what_one_process_paints(layouts: list[dict[str, Any]], schedules: list[dict[str, Any]]) -> None:
    height = 16 * 9  # patches of rows enough for four ranks
    errors = parity.differences(NAME, layouts, schedules, run=run_threads, height=height)
    assert max(errors.values()) <= parity.TOLERANCE, errors


def test_a_ring_of_lines_with_more_ranks_than_heads() -> None:
    errors = parity.differences(NAME, [{"ring": 2, "ulysses": 3}], SCHEDULES[2:], run=run_threads, height=16 * 13)
    assert max(errors.values()) <= parity.TOLERANCE, errors


def paint(pipe: Any, name: str, **options: Any) -> np.ndarray:
    arguments = tiny.call_arguments(name, height=parity.HEIGHT) | options
    return pipe(**arguments, generator=torch.Generator().manual_seed(5), output_type="latent").images.numpy()


def unmasked(pipe: Any) -> dict[str, Any]:
    """The padded prompts without their masks."""
    arguments, found = tiny.call_arguments(NAME), {"prompt": None, "negative_prompt": None}
    for kind in ("prompt", "negative_prompt"):
        embeds, _ = pipe.encode_prompt(arguments[kind], max_sequence_length=arguments["max_sequence_length"])
        found[f"{kind}_embeds"] = embeds
    return found


@pytest.mark.parametrize("schedule", [{"warmup": "all"}, {"patches": 3, "warmup": 1}, {"patches": 2, "warmup": 0}])
def test_a_padded_prompt_paints_what_it_paints_alone(schedule: dict[str, Any]) -> None:
    pipe = tiny.pipeline(NAME, dtype=torch.float64)
    dropped = unmasked(pipe)
    patchpipe.parallelize(pipe, ParallelConfig(**parity.pinned(schedule, parity.HEIGHT // 16)))
    padded, alone, wrong = paint(pipe, NAME), paint(pipe, "qwen"), paint(pipe, NAME, **dropped)
    assert parity.relative(padded[:1], alone) <= parity.TOLERANCE
    assert parity.relative(wrong[:1], alone) > 1e-2, "without its mask padding must show, or nothing was tested"


DISPLACED = [{"distrifusion": 2}, {"distrifusion": 3}]


@pytest.mark.some(of=2)
@pytest.mark.parametrize("layout", DISPLACED, ids=["2", "3"])
def test_ranks_compute_what_distrifusion_means(layout: dict[str, int]) -> None:
    parts, schedules = layout["distrifusion"], [{"warmup": warmup} for warmup in (0, 1, "all")]
    [found, *_] = run_threads(parts, parity.paint, NAME, [layout], schedules, {})
    for schedule in schedules:
        pipe, warmup = tiny.pipeline(NAME, dtype=torch.float64), schedule["warmup"]
        arguments = tiny.call_arguments(NAME, height=parity.HEIGHT)
        with naive_distrifusion(pipe, parts, 99 if warmup == "all" else int(warmup), parity.HEIGHT // 16, 2):
            expected = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent").images
        made = found[str((layout, schedule))]["latents"]
        assert parity.relative(made, expected.numpy()) <= parity.TOLERANCE, schedule


def test_products_with_distrifusion_are_exact() -> None:
    errors = parity.differences(NAME, WITH_DISTRIFUSION, SCHEDULES[:1], run=run_threads)
    assert max(errors.values()) <= parity.TOLERANCE, errors


@pytest.mark.parametrize("degree", ["ulysses", "ring"])
def test_a_mask_travels_once_for_each_patch_of_a_call(degree: str) -> None:
    """Rows of a column to each other rank: own rows times pictures times bytes, for all layers together."""
    schedule, steps, size, batch = {"patches": 2, "warmup": 0}, 2, 8, 2
    call = {"height": 128, "width": 64, "num_inference_steps": steps, "negative_prompt": None, "true_cfg_scale": 1.0}
    alike = {"prompt": [tiny.OTHER_PROMPT] * batch}  # as long as the longer of the two, so without padding
    masked, plain = (run_threads(2, parity.paint, NAME, [{degree: 2}], [schedule], call | more) for more in ({}, alike))
    key, text, image = str(({degree: 2}, schedule)), 16, 8 * 4
    for with_mask, without in zip(masked, plain, strict=True):
        extra = with_mask[key]["sent_bytes"] - without[key]["sent_bytes"]
        assert extra == (text + image) // 2 * batch * size * steps


# -- attention ---------------------------------------------------------------------------------------

TEXT, IMAGE, HEADS, CHANNELS = 3, 6, 2, 8


class Layer(nn.Module):
    """An attention layer that does nothing but attend."""

    def forward(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(rows, rows, rows, attn_mask=mask)


def through(attending: Attending, rows: Tensor, mask: Tensor | None) -> Tensor:
    layer = Layer()
    attend_through(layer, lambda: attending)
    return layer(rows, mask)


RASTER = Raster(IMAGE, 1, 1)
ROWS = sequence_of(RASTER, TEXT)


def patches(count: int = 3) -> tuple[Patch, ...]:
    return Cut.of(Raster(IMAGE, 1, 1), ParallelConfig(patches=count)).patches


def sequence() -> tuple[Tensor, Tensor]:
    """Rows of text and image, and a boolean mask of the text that differs between the two entries of the batch."""
    make = torch.Generator().manual_seed(0)
    rows = torch.randn(2, HEADS, TEXT + IMAGE, CHANNELS, generator=make, dtype=torch.float64)
    return rows, torch.tensor([[True, False, False], [True, True, False]])


def whole_mask(text: Tensor, kind: str) -> Tensor:
    """The mask of text, then image, as models pass it."""
    mask = torch.cat([text, text.new_ones(2, IMAGE)], dim=1)[:, None, None]
    if kind == "boolean":
        return mask
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    return additive if kind == "additive" else torch.cat([additive, torch.zeros_like(additive)], dim=1)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("kind", ["boolean", "additive", "by head"])
def test_patches_see_the_mask_of_the_text_that_came_with_the_first(kind: str, text_first: bool) -> None:
    rows, text_mask = sequence()
    mask, store = whole_mask(text_mask, kind), LayerStore(sequence_of(RASTER, TEXT, text_first))
    text, image = rows.split([TEXT, IMAGE], dim=2)
    for patch in patches():
        own, own_mask = image[:, :, slice(*patch.tokens)], None
        if patch.carries_riders:
            keys = [*range(TEXT), *range(TEXT, TEXT + patch.token_count)]
            order = keys if text_first else keys[TEXT:] + keys[:TEXT]
            own, own_mask = torch.cat([text, own], dim=2)[:, :, order], mask[..., order]
        made = through(Attending(patch, store, None, store.rows, masked=True), own, own_mask)
        seen = TEXT + patch.tokens[1]  # later rows do not exist yet
        right = scaled_dot_product_attention(own, rows[:, :, :seen], rows[:, :, :seen], attn_mask=mask[..., :seen])
        torch.testing.assert_close(made, right)


class Spy(TorchFunctionMode):
    """Notes what attention is called with."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self.mask = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)).get("attn_mask")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("store", [None, LayerStore(ROWS)])
def test_a_synchronous_step_hands_the_models_own_mask_on(store: LayerStore | None) -> None:
    rows, text_mask = sequence()
    mask, patch = whole_mask(text_mask, "boolean"), Cut.of(Raster(IMAGE, 1, 1), ParallelConfig()).whole
    with Spy() as spy:
        through(Attending(patch, store, None, ROWS, masked=True), rows, mask)
    assert spy.mask is mask


def test_columns_are_what_masks_add_to_scores() -> None:
    key = torch.zeros(2, HEADS, 3, CHANNELS)
    nothing = key_column(None, key, torch.float32)
    assert nothing.shape == (2, 1, 3, 1)
    assert not nothing.any()
    shared = key_column(torch.tensor([True, False, True]), key, torch.float16)
    assert shared.shape == (2, 1, 3, 1)
    assert shared.flatten(1).tolist() == [[0, -torch.inf, 0]] * 2
    assert key_column(torch.full((2, HEADS, 1, 1), -2.0), key, torch.float32).shape == (2, HEADS, 3, 1)


class Together:
    """Ranks that share a patch; no call gets as far as to them."""

    def attend(self, *_args: Any) -> Tensor:
        raise AssertionError("reached")


@pytest.mark.parametrize(
    ("mask", "masked", "sharing", "text"),
    [
        (torch.ones(TEXT + 2, TEXT + 2, dtype=torch.bool), True, None, "5 queries by 5 keys is not supported"),
        (torch.ones(2, 1, 1, TEXT + 2, dtype=torch.bool), False, None, r"its plan does not say so \(mask\)"),
        (torch.zeros(2, HEADS, 1, TEXT + 2), True, Together(), "differs from head to head"),
    ],
    ids=["by query", "unknown to the plan", "by head"],
)
def test_masks_that_would_be_wrong_are_refused(mask: Tensor, masked: bool, sharing: Any, text: str) -> None:
    rows = sequence()[0][:, :, : TEXT + 2].float()
    attending = Attending(patches()[0], LayerStore(ROWS), sharing, ROWS, masked)
    with pytest.raises(NotImplementedError, match=text):
        through(attending, rows, mask)


def test_a_mask_that_comes_and_goes_is_noticed() -> None:
    rows, store, patch = sequence()[0], LayerStore(ROWS), patches()[1]
    store.keep(rows, rows)
    with pytest.raises(RuntimeError, match="some calls of a guidance branch mask text rows"):
        through(Attending(patch, store, None, ROWS, masked=True), rows[:, :, TEXT + 2 : TEXT + 4], None)


# -- merging parts -----------------------------------------------------------------------------------

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_parts_of_which_some_are_masked_throughout_merge_to_the_whole(
    dtype: torch.dtype, order: tuple[int, ...], device: str
) -> None:
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("CUDA has no fused kernel for it")
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, length, 24).to(dtype) for length in (9, 40, 40))
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[0, ..., :17], mask[0, ..., 20:30] = False, False  # the first part takes part in the second entry alone
    column = key_column(mask, key, dtype)
    parts = [rows.to(device).split([17, 1, 22], dim=2) for rows in (key, value, column)]
    merged = Merged(query.to(device), 0.5)
    for index in order:
        merged.add(*(part[index] for part in parts))
    scores = (query.double() @ key.double().mT * 0.5).masked_fill(~mask, -torch.inf)
    error = (merged.result.double().cpu() - scores.softmax(-1) @ value.double()).abs().max()
    assert error <= ROUNDING[dtype]


def test_a_column_is_attended_with_as_its_mask_is() -> None:
    rows, text_mask = sequence()
    mask = whole_mask(text_mask, "boolean")
    made = Attend(scaled_dot_product_attention)(rows, rows, rows, key_column(mask, rows, rows.dtype))
    torch.testing.assert_close(made, scaled_dot_product_attention(rows, rows, rows, attn_mask=mask))


# -- what the plan refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ([[(1, 4, 3), (1, 2, 2)]], r"describes 1 × 4 × 3 \+ 1 × 2 × 2 tokens but the latent has 12"),
        ([[(1, 4, 3)], [(1, 3, 4)]], "does not describe pictures of one size"),
        ([[(2, 2, 3)]], "pictures of one frame"),
        ([[(1, 5, 3)]], "describes 1 × 5 × 3 tokens but the latent has 12"),
    ],
)
def test_pictures_that_do_not_form_one_raster_are_refused(shapes: list[list[tuple[int, ...]]], text: str) -> None:
    grid, latent = Latent("bnc", sizes=sizes_by_shapes(), references=True), torch.zeros(2, 12, 16)
    with pytest.raises(ValueError, match=text):
        grid.rows(nn.Module(), latent.shape, {"hidden_states": latent, "img_shapes": shapes})
    right = {"hidden_states": latent, "img_shapes": [(1, 4, 3)] * 2}
    assert grid.rows(nn.Module(), latent.shape, right) == Raster(4, 3, 3)


def test_configurations_nothing_tests_are_refused(tmp_path: Any) -> None:
    pipe = tiny.pipeline("qwen")
    pipe.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(UnsupportedModel, match="with guidance_embeds=True has not been tested"):
        patchpipe.parallelize(pipe, ParallelConfig())
    pipe.save_pretrained(tmp_path)
    for refuse in (lambda: patchpipe.from_pretrained(tmp_path), lambda: check_folder(tmp_path, ParallelConfig())):
        with pytest.raises(UnsupportedModel, match="guidance_embeds"):
            refuse()


def test_tensor_restores_how_heads_are_counted() -> None:
    model = tiny.pipeline("qwen").transformer
    plan, layer = plan_for(model), model.transformer_blocks[0].attn
    part = TensorPart(model, plan, range(4), 1, 2)
    part.attach(None)  # type: ignore[arg-type]
    assert (layer.heads, layer.inner_dim) == (1, 16)
    part.detach()
    assert (layer.heads, layer.inner_dim) == (2, 32)
