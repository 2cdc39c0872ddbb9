"""Part d: which of torch's attention kernels runs in the transformer, for every method.

Counted by torch's profiler, from the names of the operators; those of text encoders and VAE are left out.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import patchpipe
from bench.gpu.painting import LARGE, Case, pipeline, request
from bench.gpu.ranks import Ranks, Spot, problems
from bench.gpu.setting import Note, Setting
from patchpipe.stage import compiling

OUTSIDE = "outside the transformer"
PREFIX = "aten::_scaled_dot_product_"
NAMES = {
    "flash_attention": "flash", "efficient_attention": "memory-efficient", "cudnn_attention": "cuDNN",
    "attention_math": "math", "flash_attention_for_cpu": "flash",
}  # fmt: skip
SLOW = "math"
PATCHES: dict[str, Any] = {"patches": 4, "warmup": 1}
ALONE: dict[str, dict[str, Any] | None] = {"plain diffusers": None, "one rank, 4 patches": PATCHES}
TWO: dict[str, dict[str, Any]] = {
    "pipefusion": {"pipefusion": 2, **PATCHES}, "ulysses": {"ulysses": 2}, "ring": {"ring": 2}, "tensor": {"tensor": 2},
    "distrifusion": {"distrifusion": 2}, "cfg": {"cfg": 2},
    "pipefusion, compiled": {"pipefusion": 2, **PATCHES, "compile": True},
}  # fmt: skip
MODELS = (
    ("flux", "bf16"),
    (f"{LARGE}flux-wide", "bf16"),
    (f"{LARGE}sd3", "bf16"),
    ("qwen-padded", "bf16"),
    ("flux", "fp32"),
)


def run(setting: Setting, note: Note) -> None:
    """A row for every model and method; wrong where the slow kernel runs."""
    places = setting.places(2, own=False)
    models = (("flux", "fp32"), ("qwen-padded", "bf16")) if setting.tiny else MODELS
    with Ranks(places) as ranks:
        for model, dtype in models:
            for method, layout in ALONE.items():
                note(*_row(model, dtype, method, [kernels(Spot(0, 1, None, places[0]), Case(model, dtype, layout))]))
            for method, layout in _methods(setting, model, dtype).items():
                answers = ranks.run(kernels, Case(model, dtype, layout), patience=45.0)
                why = problems(answers)
                if why:
                    note(f"{model} {dtype}, {method}", False, {"why": why})
                else:
                    note(*_row(model, dtype, method, [answer.value for answer in answers]))


def _methods(setting: Setting, model: str, dtype: str) -> dict[str, dict[str, Any]]:
    """All methods for the first model, those that touch keys for the others; guidance needs two branches."""
    if setting.tiny:
        return {"ring": TWO["ring"]} if model == "flux" else {}
    if (model, dtype) == MODELS[0]:
        return TWO
    return {name: TWO[name] for name in ("pipefusion", "ulysses", "ring", "distrifusion")}


def kernels(spot: Spot, case: Case) -> dict[str, Any]:
    """Calls of each kernel on this rank in a request of two steps, and what patchpipe warned of."""
    pipe, call = pipeline(case.model, case.dtype, spot.device, case.blocks)
    config = None if case.layout is None else case.config(spot.device)
    if config is not None:
        patchpipe.parallelize(pipe, config, group=spot.join(config))
    try:
        # Attention is called from compiled blocks as it is: their own kernels need not be made.
        with heard() as warned, mock.patch.object(compiling, "BACKEND", "eager"):
            found = counted(pipe, lambda: request(pipe, call, num_inference_steps=3))
    except BaseException:
        pipeline.cache_clear()
        raise
    finally:
        if getattr(pipe, "patchpipe", None) is not None:
            patchpipe.restore(pipe)
    return {"kernels": dict(found), "warned": [text for text in warned if "slow kernel" in text]}


def counted(pipe: Any, work: Callable[[], Any]) -> Counter[str]:
    """Attention operators of a request by kernel, those outside the transformer left out."""
    parts = [part for name, part in pipe.components.items() if isinstance(part, nn.Module) and name != "transformer"]
    with marked(parts), profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    found: Counter[str] = Counter()
    for event in profiler.events():
        kernel = NAMES.get(event.name.removeprefix(PREFIX)) if event.name.startswith(PREFIX) else None
        if kernel is not None and not _inside(event, OUTSIDE):
            found[kernel] += 1
    return found


@contextmanager
def marked(parts: list[nn.Module]) -> Iterator[None]:
    """While it lasts, the profiler sees what is done in these modules as outside."""
    open_: list[Any] = []

    def enter(*_: Any) -> None:
        open_.append(record_function(OUTSIDE))
        open_[-1].__enter__()

    def leave(*_: Any) -> None:
        open_.pop().__exit__(None, None, None)

    handles = [part.register_forward_pre_hook(enter) for part in parts]
    handles += [part.register_forward_hook(leave, always_call=True) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inside(event: Any, name: str) -> bool:
    while event is not None:
        if event.name == name:
            return True
        event = event.cpu_parent
    return False


@contextmanager
def heard() -> Iterator[list[str]]:
    """What patchpipe logs while it lasts."""
    texts: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    ear, logger = Ear(level=logging.INFO), logging.getLogger("patchpipe")
    kept = logger.level
    logger.addHandler(ear)
    logger.setLevel(logging.INFO)
    try:
        yield texts
    finally:
        logger.setLevel(kept)
        logger.removeHandler(ear)


def _row(model: str, dtype: str, method: str, ranks: list[dict[str, Any]]) -> tuple[str, bool, dict[str, Any]]:
    total: Counter[str] = Counter()
    for rank in ranks:
        total.update(rank["kernels"])
    warned = sorted({text for rank in ranks for text in rank["warned"]})
    figures = {"model": model, "dtype": dtype, "method": method, "kernels": dict(total), "warned": warned}
    return f"{model} {dtype}, {method}", bool(total) and not total[SLOW], figures
