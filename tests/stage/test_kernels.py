"""Which of torch's attention kernels takes a call; CUDA's stand on the meta device, where shapes alone are computed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.engine.processes.fresh import environment
from patchpipe.kernels import choice, lse
from patchpipe.kernels.choice import KernelWatch, kernel_for, refusals, watch_kernels
from patchpipe.models.latent import Raster
from patchpipe.stage.keys.store import LayerStore
from patchpipe.stage.patches import Cut
from tests import tiny
from tests.support.ranks import Place
from tests.support.sequences import sequence_of
from tests.support.threads import run_threads

FUSED = {
    SDPBackend.FLASH_ATTENTION: "_scaled_dot_product_flash_attention",
    SDPBackend.EFFICIENT_ATTENTION: "_scaled_dot_product_efficient_attention",
    SDPBackend.CUDNN_ATTENTION: "_scaled_dot_product_cudnn_attention",
}


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def picks(kernel: SDPBackend) -> Callable[..., SDPBackend]:
    return lambda *_args, **_options: kernel


# -- log-sum-exp -------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", FUSED)
def test_ring_takes_the_kernel_that_torch_would(
    kernel: SDPBackend, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd channels are padded for the kernel, its own padding is taken off, masks come over rows of aligned memory."""
    monkeypatch.setattr(lse, "kernel_for", picks(kernel))
    called: list[Any] = []
    real = getattr(torch.ops.aten, FUSED[kernel])
    monkeypatch.setattr(
        torch.ops.aten, FUSED[kernel], lambda *args, **named: called.append(args) or real(*args, **named)
    )
    query, key = rows(2, 5, 3, 13).transpose(1, 2), rows(2, 3, 9, 13)
    mask = rows(2, 1, 1, 9) if masked and kernel != SDPBackend.FLASH_ATTENTION else None
    result, sums = lse.attend_on_cuda(query, key, key, None, mask)
    assert (result.shape, sums.shape) == (query.shape, query.shape[:3])
    assert (result.dtype, sums.dtype) == (torch.bfloat16, torch.float32)
    assert len(called) == 1
    assert called[0][0].shape[-1] == 16
    if kernel == SDPBackend.CUDNN_ATTENTION:  # it does not look at strides when it is called by itself
        assert all(tensor.is_contiguous() for tensor in called[0][:3])
    if mask is not None:
        bias = called[0][3]
        assert bias.shape == (2, 3, 5, 9)
        assert all(stride % 16 == 0 for stride in bias.stride()[:3])


@pytest.mark.parametrize("extra", [False, True])
def test_sums_of_cudnn_have_a_dim_more_from_torch_2_9_on(extra: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lse, "kernel_for", picks(SDPBackend.CUDNN_ATTENTION))
    name = FUSED[SDPBackend.CUDNN_ATTENTION]
    sums = torch.zeros(1, 2, 5, *([1] if extra else []), device="meta")
    monkeypatch.setattr(torch.ops.aten, name, lambda query, *_args, **_named: (query, sums))
    assert lse.attend_on_cuda(rows(1, 2, 5, 16), rows(1, 2, 9, 16), rows(1, 2, 9, 16), None)[1].shape == (1, 2, 5)


def test_ring_says_why_no_kernel_takes_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lse, "kernel_for", picks(SDPBackend.MATH))
    monkeypatch.setattr(lse, "refusals", lambda *_args: "flash: it is Tuesday")
    with pytest.raises(NotImplementedError, match=r"it is Tuesday\): use float16"):
        lse.attend_on_cuda(rows(1, 2, 5, 16), rows(1, 2, 9, 16), rows(1, 2, 9, 16), None)


# -- the choice --------------------------------------------------------------------------------------


def test_the_choice_is_torchs_own() -> None:
    query = torch.randn(1, 2, 8, 16)
    assert kernel_for(query, query, query) == SDPBackend.FLASH_ATTENTION  # the CPU's
    assert kernel_for(query, query, query, None, 0.5) == SDPBackend.MATH  # with dropout there is none
    assert kernel_for(query, query, query, torch.zeros(1, 1, 1, 8), 0.0, False, 0.3, False) is not None


def test_reasons_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash(_asked: Any, debug: bool) -> bool:
        assert debug
        warnings.warn("Expected query to be Half. (Triggered internally at /a/b.cpp:7.)", stacklevel=1)
        return False

    monkeypatch.setattr(choice.cuda, "can_use_flash_attention", flash)
    monkeypatch.setattr(choice.cuda, "can_use_efficient_attention", lambda _asked, _debug: False)
    monkeypatch.setattr(choice.cuda, "can_use_cudnn_attention", lambda _asked, _debug: True)
    query = torch.randn(1, 2, 8, 16)
    told = refusals(query, query, query)
    assert told == "flash: Expected query to be Half; memory-efficient: refused without a reason"


def test_refusals_can_be_asked_of_this_torch() -> None:
    query = torch.randn(1, 2, 8, 16, dtype=torch.float64)
    assert refusals(query, query, query).startswith("flash: ")


# -- a fall to the slow kernel -----------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A device where float32 falls to the slow kernel; every look-up is noted."""
    asked: list[tuple[Any, ...]] = []

    def double(query: Tensor, *rest: Any) -> SDPBackend:
        asked.append((query, *rest))
        return SDPBackend.MATH if query.dtype == torch.float32 else SDPBackend.FLASH_ATTENTION

    monkeypatch.setattr(choice, "kernel_for", double)
    monkeypatch.setattr(choice, "refusals", lambda *_args: "flash: it wants 16 bits")
    return asked


def test_a_fall_is_told_once_with_its_reason(slow: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    watch = KernelWatch()
    attend = watch.watching(functional.scaled_dot_product_attention)
    half, single = torch.randn(1, 2, 8, 16).bfloat16(), torch.randn(1, 2, 8, 16)
    for query in (half, half, single, single, torch.randn(1, 2, 8, 24)):
        torch.testing.assert_close(
            attend(query, query, value=query, attn_mask=None, is_causal=False, scale=0.3),
            functional.scaled_dot_product_attention(query, query, query, scale=0.3),
        )
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for text in ("slow kernel", "float32, 16 channels a head", "flash: it wants 16 bits", "bfloat16 or float16"):
        assert text in record.getMessage()
    assert len(slow) == 2, "a kind of call is looked up once, and none after the warning"


def test_what_decides_is_looked_at_and_rows_are_not(slow: list[Any]) -> None:
    watch = KernelWatch()
    for length in (8, 9, 33):
        query = torch.randn(1, 2, length, 16).bfloat16()
        watch.look(query, query, query)
    assert len(slow) == 1
    watch.look(query, query, query, torch.zeros(1, 1, 1, 33))
    watch.look(query, query.mT.contiguous().mT, query)
    assert len(slow) == 3
    watch.look(query[:, :0], query[:, :0], query[:, :0])  # no heads: nothing to compute
    assert len(slow) == 3


def test_only_cuda_has_kernels_to_fall_from() -> None:
    assert watch_kernels(torch.device("cpu"), output=True) is None
    loud, quiet = (watch_kernels(torch.device("cuda"), output) for output in (True, False))
    assert (loud._level, quiet._level) == (logging.WARNING, logging.INFO)


LAYOUTS: list[dict[str, Any]] = [
    {"patches": 2}, {"ulysses": 2}, {"distrifusion": 2}, {"tensor": 2}, {"pipefusion": 2, "warmup": "all"},
    {"ulysses": 2, "compile": True},
]  # fmt: skip


@pytest.mark.some(of=2)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_method_is_watched(
    layout: dict[str, Any],
    slow: list[Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under a double that takes the CPU for a GPU: the output rank warns once in two requests."""
    monkeypatch.setattr(
        "patchpipe.pipeline.attachment.watch_kernels",
        lambda _device, output: watch_kernels(torch.device("cuda"), output),
    )
    monkeypatch.setattr("patchpipe.stage.compiling.BACKEND", "eager")

    def paint(place: Place) -> None:
        pipe, config = tiny.pipeline("flux"), ParallelConfig(**layout)
        patchpipe.parallelize(pipe, config, group=place.join(config))
        for _ in range(2):
            call = tiny.call_arguments("flux", guided=False, steps=2)
            pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent")
        patchpipe.restore(pipe)

    run_threads(ParallelConfig(**layout).world_size, paint)
    told = [record for record in caplog.records if "slow kernel" in record.getMessage()]
    assert [record.levelno for record in told].count(logging.WARNING) == 1


# -- no mask for nothing -----------------------------------------------------------------------------


@pytest.mark.parametrize("text_first", [True, False])
def test_rows_of_the_image_alone_carry_no_column(text_first: bool) -> None:
    """Keys of which none is masked go to the fast kernel, which takes no mask."""
    text = 2
    store = LayerStore(sequence_of(Raster(2, 4, 4), text, text_first))
    key, column = torch.randn(1, 2, text + 8, 4), torch.zeros(1, 1, text + 8, 1)
    store.keep(key, key, column)
    first, second = Cut.of(Raster(2, 4, 4), ParallelConfig(patches=2)).patches
    assert [len(part) for part in store.others(first)] == [2]  # the text rides with it
    assert [len(part) for part in store.others(second)] == ([3] if text_first else [2, 3])


# -- workers -----------------------------------------------------------------------------------------


def test_streams_of_communicators_have_hardware_queues_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    assert environment(1, False)["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    assert environment(1, False)["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"  # the user knows better
