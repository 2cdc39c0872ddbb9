"""What the tests show of every family: the tables they run over, by column of the matrix.

Nothing is typed here that a test does not run: names and layouts are the tests' own tables.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import diffusers
from diffusers.loaders import PeftAdapterMixin

from patchpipe.layout.axes import DEGREES
from tests import tiny
from tests.loading import test_quantised
from tests.models import test_family_features, test_flux_relatives, test_images, test_prefix, test_video
from tests.offload import test_offload_parity
from tests.parallel import test_displaced, test_parallel, test_tensor
from tests.pipeline import test_lora, test_pipelines
from tests.schedule import test_together
from tests.stage import test_compile, test_forecast, test_masks, test_streamed, test_text_patches
from tests.tiny import images as tiny_images

SYNCHRONOUS = "synchronous"
STREAMED = (
    test_images.test_every_family_paints_what_one_device_paints,
    test_video.test_every_family_streams_as_the_oracle_does,
)


@dataclass(frozen=True)
class Evidence:
    """One test.

    Attributes:
        test: The function.
        names: The tiny pipelines it runs, or classes of pipelines.
        shows: Columns of the matrix.
    """

    test: Callable[..., Any]
    names: tuple[str, ...]
    shows: tuple[str, ...]

    @property
    def where(self) -> str:
        """Its place, for people."""
        return f"{inspect.getmodule(self.test).__name__.replace('.', '/')}.py::{self.test.__name__}"  # type: ignore[union-attr]


def methods(layouts: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The methods in some layouts."""
    used = {name for layout in layouts for name, degree in layout.items() if name in DEGREES and degree > 1}
    return tuple(name for name in DEGREES if name in used)


def _of(test: Callable[..., Any], names: Sequence[str], *shows: str) -> Evidence:
    return Evidence(test, tuple(names), shows)


def _streaming() -> list[Evidence]:
    """Patches stream, compared with the oracle."""
    images, video = STREAMED
    found = [_of(images, [name], *methods(test_images.layouts_of(name))) for name in test_images.NAMES]
    found.append(_of(video, test_video.NAMES, *methods([*test_video.TWO, *test_video.FOUR])))
    parallel = test_parallel
    found.append(_of(parallel.test_layouts_paint_what_one_device_paints, parallel.MODELS, *methods(parallel.LAYOUTS)))
    families = parallel.test_every_family_paints_what_one_device_paints
    found.append(_of(families, parallel.FAMILIES, *methods(parallel.FAMILY_LAYOUTS)))
    found.append(_of(parallel.test_data_parallel_pictures_are_those_of_one_device, parallel.MODELS, "data"))
    masked = [*test_masks.TWO, *test_masks.THREE, *test_masks.FOUR, *test_masks.EIGHT]
    found.append(_of(test_masks.test_layouts_paint_what_one_process_paints, [test_masks.NAME], *methods(masked)))
    apart = test_masks.test_ranks_compute_what_distrifusion_means
    found.append(_of(apart, [test_masks.NAME], *methods(test_masks.DISPLACED)))
    apart = test_displaced.test_ranks_compute_what_distrifusion_means
    layouts = [layout for some in test_displaced.LAYOUTS.values() for layout in some]
    found.append(_of(apart, test_displaced.MODELS, *methods(layouts)))
    for names, split in test_tensor.SPLIT:
        found.append(_of(test_tensor.test_split_matrices_paint_what_whole_ones_paint, names, *methods(split)))
    found.append(_of(test_prefix.test_ranks_may_share_matrices, [test_prefix.SHARED], "tensor"))
    relatives = test_flux_relatives.test_they_are_exact_and_stream_as_they_should
    found.append(_of(relatives, tuple(test_flux_relatives.KINDS), SYNCHRONOUS, "pipefusion"))
    return found


def _features() -> list[Evidence]:
    exact = "test_every_family_from_disk_is_bit_equal_where_all_steps_are_synchronous"
    found = [_of(getattr(each, exact), each.NAMES, SYNCHRONOUS) for each in (test_images, test_video)]
    parallel = test_parallel  # whose schedules begin with one of warm-up steps alone
    found.append(_of(parallel.test_layouts_paint_what_one_device_paints, parallel.MODELS, SYNCHRONOUS))
    found.append(_of(parallel.test_every_family_paints_what_one_device_paints, parallel.FAMILIES, SYNCHRONOUS))
    found.append(_of(test_masks.test_layouts_paint_what_one_process_paints, [test_masks.NAME], SYNCHRONOUS))
    turn = test_pipelines.test_pipelines_on_the_same_weights_are_served_in_turn
    found += [_of(turn, kinds, SYNCHRONOUS) for kinds in test_pipelines.KINDS.values()]
    found += [
        _of(STREAMED[0], tuple(tiny_images.REFERENCES), "references"),
        _of(
            test_forecast.test_law_2_a_forecast_does_not_depend_on_the_number_of_stages,
            test_forecast.FAMILIES,
            "forecast",
        ),
        _of(
            test_streamed.test_law_2_a_warmup_that_streams_is_the_oracles_on_any_number_of_stages,
            test_streamed.NAMES,
            "streamed",
        ),
        _of(
            test_streamed.test_law_2_a_warmup_that_streams_is_the_oracles_on_any_number_of_stages,
            test_streamed.FORECAST,
            "forecast",
        ),
        _of(test_text_patches.test_spread_text_is_what_it_means, test_text_patches.FAMILIES, "text_patches"),
        _of(
            test_compile.test_graphs_are_few_and_paint_the_same,
            tuple(name for name, _ in test_compile.GRAPHS),
            "compile",
        ),
        _of(test_compile.test_kernels_paint_the_same_whatever_the_stages, [test_compile.KERNELS], "compile"),
        _of(
            test_offload_parity.test_offload_paints_the_same,
            tuple(name for name, _ in test_offload_parity.LAYOUTS),
            "offload",
        ),
        _of(test_lora.test_lora_loaded_before_or_after_is_bit_equal_to_plain_diffusers, test_lora.NAMES, "lora"),
        _of(test_quantised.test_a_quantised_pipeline_is_that_of_diffusers, tiny.MODELS, "quantised"),
        _of(test_together.test_law_2_together_is_what_each_is_alone, tiny.MODELS, "together"),
    ]
    apart = test_family_features.test_pictures_apart_with_lora_and_weights_that_come_and_go
    kept = [name for name in test_family_features.NAMES if name not in test_family_features.ALONE]
    found += [_of(apart, test_family_features.NAMES, "offload"), _of(apart, kept, "data")]
    takes = [name for name in test_family_features.NAMES if issubclass(_class(name), PeftAdapterMixin)]
    found.append(_of(apart, takes, "lora"))
    both = test_family_features.test_requests_in_flight_together_with_quantised_weights
    found.append(_of(both, test_family_features.NAMES, "quantised", "together"))
    return found


def _class(name: str) -> type:
    found: type = getattr(diffusers, transformer_of(kind_of(name)))
    return found


def evidence() -> list[Evidence]:
    """All of it."""
    return [*_streaming(), *_features()]


def kind_of(name: str) -> type:
    """The class of a tiny pipeline, or the one of this name."""
    return getattr(diffusers, name) if name.endswith("Pipeline") else tiny.kind_of(name)


def transformer_of(kind: type) -> str:
    """The transformer class a pipeline is made with."""
    told = inspect.signature(kind.__init__).parameters["transformer"].annotation  # type: ignore[misc]
    if isinstance(told, str):
        return told.partition(" |")[0]
    return next(each for each in get_args(told) or (told,) if each is not type(None)).__name__
