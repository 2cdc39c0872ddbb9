"""Products of methods: what is refused, and that whatever is allowed paints what one device paints.

What ranks send and hold meanwhile is compared with the formulas that `patchpipe explain` shows.
"""

from __future__ import annotations

import dataclasses

import pytest

from patchpipe import ParallelConfig
from patchpipe.layout.combinations import TESTED, check_combination
from patchpipe.layout.volume import Volume, kept, traffic
from patchpipe.planner.work.describe import volume_of
from tests import tiny
from tests.support import parity

MODELS = ("flux", "sd3", "pixart")  # Qwen-Image, whose text is masked, is in test_masks.py
EXACT = [{"warmup": "all"}]
STREAMING = [{"warmup": "all"}, {"patches": 2, "warmup": 1}]
STEPS, IMAGES, IMAGE, FLOAT64 = 4, 2, 8 * 3, 8
TEXT = {"flux": 8, "sd3": 32 + 8, "pixart": 8}  # SD3 joins CLIP's rows and T5's; PixArt's text stays outside
VOLUMES = {  # told block by block: FLUX's single-stream ones end one pair of matrices, SD3's last one has no text side
    "flux": Volume(32, 32, attended=4 * 32, summed=2 * 2 * 32 + 2 * 32, itemsize=FLOAT64),
    "sd3": Volume(64, 32, attended=4 * 64, summed=3 * 2 * 64 + 2 * 24, itemsize=FLOAT64),
    "pixart": Volume(24, 48, attended=4 * 24, summed=4 * 3 * 24, itemsize=FLOAT64),
}


@pytest.mark.some(of=8)
@pytest.mark.parametrize("methods", TESTED, ids=lambda methods: "-".join(sorted(methods)))
@pytest.mark.parametrize("name", MODELS)
def test_law_6_whatever_is_allowed_is_tested(name, methods):
    layout = dict.fromkeys(sorted(methods), 2)
    schedules = EXACT if "distrifusion" in methods else STREAMING
    found = parity.compare(name, [layout], schedules, height=128, num_images_per_prompt=IMAGES)
    for case, made in found.items():
        assert made.error <= parity.TOLERANCE, (case, made.error)
        assert made.sent == expected_traffic(name, layout), case
    assert [made.kept for made in found.values()] == [0, expected_stores(name, layout)][: len(schedules)]


def on_all_ranks(config: ParallelConfig) -> int:
    """Ranks, times the branches and pictures that each of them runs."""
    return config.world_size * 2 * IMAGES // (config.cfg * config.data)


def expected_traffic(name: str, layout: dict[str, int]) -> dict[str, float]:
    """Bytes all ranks send in a request, by method; no last stage sends anything on."""
    config = ParallelConfig(**layout)
    stages = {"pipefusion": (config.pipefusion - 1) / config.pipefusion}
    sent = traffic(config.mesh_shape, VOLUMES[name])
    return {method: STEPS * on_all_ranks(config) * size * stages.get(method, 1) for method, size in sent.items()}


def expected_stores(name: str, layout: dict[str, int]) -> float:
    """Bytes of keys and values on all ranks."""
    config = ParallelConfig(**layout)
    return on_all_ranks(config) * kept(config.mesh_shape, VOLUMES[name], forecasts=False)


@pytest.mark.parametrize("name", MODELS)
def test_explain_counts_a_models_rows_block_by_block(name, tmp_path):
    found = volume_of(tiny.save(name, tmp_path), ParallelConfig(), IMAGE, TEXT[name])
    assert dataclasses.replace(found, itemsize=FLOAT64) == VOLUMES[name]


def test_untested_products_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"data × tensor is not tested .* nearest that is tested is .*; leave out"):
        ParallelConfig(data=2, tensor=2)
    with pytest.raises(ValueError, match="leave out"):
        check_combination(frozenset({"distrifusion", "ulysses"}))


def test_single_methods_are_allowed():
    for methods in TESTED:
        for method in methods:
            assert ParallelConfig(**{method: 2}).world_size == 2
