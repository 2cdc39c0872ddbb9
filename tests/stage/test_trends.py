"""A forecast's passes over rows: in eight bits nothing wraps, and fused ones give what torch's operations give.

Triton's kernels run here without a GPU, in its interpreter: `make fused`.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.kernels.passes import ALIKE, difference, passes_for
from patchpipe.kernels.trends import PLAIN, Passes, Rows
from patchpipe.stage.keys import forecast
from tests import tiny
from tests.support.parity import relative
from tests.support.ranks import Place
from tests.support.threads import run_threads

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def fused() -> Passes:
    pytest.importorskip("triton", reason="make fused")
    from patchpipe.kernels.trends_fused import FUSED

    return FUSED


def one_at_a_time(passes: Passes) -> Passes:
    """For ranks that are threads: Triton's interpreter serves one."""
    alone = threading.Lock()

    def held(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with alone:
                return run(*args)

        return call

    return replace(passes, renew=held(passes.renew), show=held(passes.show))


def plain() -> Passes:
    return PLAIN


@pytest.fixture
def anew() -> Iterator[None]:
    passes_for.cache_clear()
    yield
    passes_for.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("passes", [plain, fused])
def test_the_largest_change_of_a_row_does_not_wrap(passes: Callable[[], Passes], dtype: torch.dtype) -> None:
    """The scale of a row is rounded to its dtype: with 127 steps the largest number came to 128 in bfloat16."""
    old, new = torch.randn(2, 1, 4, 500, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = Rows(old.clone(), torch.zeros_like(old, dtype=torch.int8), old.new_zeros(1, 4, 500, 1))
    passes().renew(rows, new, old.new_zeros(1, 4, 1, 1), torch.zeros((), dtype=torch.float64), False)
    assert torch.equal(rows.kept, new)
    change, kept = new.double() - old.double(), rows.change.double() * rows.scale.double()
    step = change.abs().amax(-1, keepdim=True) / 126
    assert ((kept - change).abs() <= 1.6 * step).all(), "half a step of eight bits, and what the dtype rounds"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [24, 64, 128])
def test_fused_passes_give_what_torchs_operations_give(dtype: torch.dtype, channels: int) -> None:
    assert difference(fused(), CPU, dtype, channels) <= (1e-5 if dtype == torch.float32 else ALIKE)


def test_passes_that_are_wrong_are_told_apart() -> None:
    def stays(rows: Rows, ahead: Tensor) -> None:
        pass

    def wraps(rows: Rows, fresh: Tensor, *rest: Tensor | bool) -> object:
        sums = PLAIN.renew(rows, fresh, *rest)  # type: ignore[arg-type]
        rows.change[rows.change == 126] = -128
        return sums

    for wrong in (replace(PLAIN, show=stays), replace(PLAIN, renew=wraps)):
        assert difference(wrong, CPU, torch.bfloat16) > 3 * ALIKE


COMPILES = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from patchpipe.kernels import trends_fused as fused

SIZES = {"CHANNELS": 128, "WIDTH": 128, "ROWS": 32, "SUMMED": True}
KINDS = {"change": "*i8", "again": "*fp64", "sums": "*fp64", "largest": "fp32"}
KINDS |= dict.fromkeys(("fresh", "kept", "scale", "ahead"), "*bf16") | dict.fromkeys(SIZES, "constexpr")
for kernel in (fused._renew_kernel, fused._show_kernel):
    kinds = {name: KINDS.get(name, "i32") for name in kernel.arg_names}
    sizes = {name: size for name, size in SIZES.items() if name in kinds}
    for capability in (80, 90):
        made = compile(ASTSource(kernel, kinds, sizes), target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"] and ".local" not in made.asm["ptx"], "rows are held in registers"
"""


def test_kernels_compile_for_cards() -> None:
    """A100 and H100, in bfloat16; for that no card is needed."""
    fused()
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILES], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def painted(place: Place, stages: int) -> Tensor | None:
    pipe, config = tiny.pipeline("flux", blocks=4), ParallelConfig(pipefusion=stages, patch_rows=(2, 1, 1), timeout=60)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    arguments = tiny.call_arguments("flux", steps=5)
    output = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent")
    return None if output is None else tiny.painted(output)


def test_law_2_a_picture_with_fused_passes_does_not_depend_on_the_number_of_stages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = run_threads(1, painted, 1)[0]
    used = one_at_a_time(fused())
    monkeypatch.setattr(forecast, "passes_for", lambda *_: used)
    alone, both = run_threads(1, painted, 1)[0], run_threads(2, painted, 2)[0]
    assert torch.equal(alone, both)
    assert 0 < relative(alone.numpy(), right.numpy()) < 1e-4, "another order of sums, and no other difference"


@pytest.mark.usefixtures("anew")
def test_where_triton_fails_torchs_operations_take_over_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    """Here there is no GPU, which is one way to fail."""
    assert passes_for(CPU, torch.float32) is PLAIN
    with caplog.at_level(logging.WARNING, "patchpipe"):
        assert passes_for(torch.device("cuda"), torch.bfloat16) is PLAIN
    if find_spec("triton") is not None:
        assert "which are slower: Triton fails" in caplog.text
