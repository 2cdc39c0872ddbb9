"""Products of methods: what is refused, and that whatever is allowed paints what one process paints."""

from __future__ import annotations

import pytest

from patchpipe import ParallelConfig
from patchpipe.combinations import TESTED, check_combination
from tests import parity

MODELS = ("flux", "sd3", "pixart")  # Qwen-Image, whose text is masked, is in test_masks.py
EXACT = [{"warmup": "all"}]
STREAMING = [{"warmup": "all"}, {"patches": 2, "warmup": 1}]


@pytest.mark.parametrize("methods", TESTED, ids=lambda methods: "-".join(sorted(methods)))
@pytest.mark.parametrize("name", MODELS)
def test_law_6_whatever_is_allowed_is_tested(name, methods):
    if name == "pixart" and "tensor" in methods:
        name = "pixart-4"  # whose heads two ranks can share
    layout = dict.fromkeys(sorted(methods), 2)
    call = {"height": 128, "num_images_per_prompt": 2}
    schedules = EXACT if "distrifusion" in methods else STREAMING
    errors = parity.differences(name, [layout], schedules, **call)
    assert max(errors.values()) <= parity.TOLERANCE, errors


def test_untested_products_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"data × tensor is not tested .* nearest that is tested is .*; leave out"):
        ParallelConfig(data=2, tensor=2)
    with pytest.raises(ValueError, match="leave out"):
        check_combination(frozenset({"distrifusion", "ulysses"}))


def test_single_methods_are_allowed():
    for methods in TESTED:
        for method in methods:
            assert ParallelConfig(**{method: 2}).world_size == 2
