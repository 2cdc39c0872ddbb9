"""What a layout paints on this device, and how far that is from what it should."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

import patchpipe
from bench.gpu.ranks import Spot
from bench.shapes import SHAPES
from patchpipe import ParallelConfig
from tests import tiny
from tests.support.nccl_rules import under_nccl_rules

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LARGE = "large "
HEIGHT = 112  # 7 rows of tokens: divides by nothing
STEPS = 4
TIMEOUT = 20.0  # of a wait: a hang is to cost no more


@dataclass(frozen=True)
class Case:
    """A model and a layout.

    Attributes:
        model: A tiny pipeline, or after ``LARGE`` one of the bench's shapes.
        dtype: ``"bf16"`` or ``"fp32"``.
        layout: Options of ``ParallelConfig``; ``None`` is plain diffusers.
        blocks: Blocks of a tiny pipeline.
        nccl: Whether the ranks talk over NCCL; on a CPU under its rules.
    """

    model: str
    dtype: str
    layout: dict[str, Any] | None = field(default=None, hash=False)
    blocks: int = 4
    nccl: bool = False

    @property
    def title(self) -> str:
        """For people."""
        if self.layout is None:
            return f"{self.model} {self.dtype}, plain diffusers"
        return f"{self.model} {self.dtype}, {self.config('cpu').describe()}"

    def config(self, device: str) -> ParallelConfig:
        """The layout, pinned where the program's own choice may differ with the number of ranks."""
        options: dict[str, Any] = {
            "split_batch": False,
            "share_blocks": False,
            "timeout": TIMEOUT,
            **(self.layout or {}),
        }
        backend = "gloo" if not self.nccl else "auto" if device == "cpu" else "nccl"
        return ParallelConfig(**options, backend=backend)


@lru_cache(maxsize=2)
def pipeline(model: str, dtype: str, device: str, blocks: int) -> tuple[Any, dict[str, Any]]:
    """A pipeline on its device, and the arguments of its call."""
    if model.startswith(LARGE):
        pipe, call = SHAPES[model.removeprefix(LARGE)].build()
        call = {**call, "num_inference_steps": STEPS}
    else:
        pipe, call = tiny.pipeline(model, blocks=blocks), tiny.call_arguments(model, height=HEIGHT, steps=STEPS)
    pipe.to(device, DTYPES[dtype])
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**call, "output_type": "latent"}


def paint(spot: Spot, case: Case, **changes: Any) -> dict[str, Any]:
    """What a rank makes of a case: ``latents`` as float32 on the output rank, and figures of the request."""
    pipe, call = pipeline(case.model, case.dtype, spot.device, case.blocks)
    if case.layout is None:
        return {"latents": numbers(request(pipe, call, **changes))}
    with rules(spot, case):
        config = case.config(spot.device)
        try:
            patchpipe.parallelize(pipe, config, group=spot.join(config))
            latents = numbers(request(pipe, call, **changes))
            return {"latents": latents, **pipe.patchpipe.last.as_dict()}
        except BaseException:
            pipeline.cache_clear()  # it may be half attached
            raise
        finally:
            if getattr(pipe, "patchpipe", None) is not None:
                patchpipe.restore(pipe)


def rules(spot: Spot, case: Case) -> AbstractContextManager[Any]:
    """On a CPU the double of NCCL, for a case that is to talk over it."""
    return under_nccl_rules() if case.nccl and spot.device == "cpu" else nullcontext()


def request(pipe: Any, call: dict[str, Any], **changes: Any) -> Any:
    """One request, with noise from the host, which is the same everywhere."""
    return pipe(**{**call, **changes}, generator=torch.Generator().manual_seed(0))


def numbers(output: Any) -> np.ndarray | None:
    """A request's latents as float32 on the host; ``None`` on ranks that put nothing out."""
    return None if output is None else output.images.detach().float().cpu().numpy()


def alone(case: Case, device: str) -> np.ndarray:
    """What one process makes of a case, one rank after the other's work."""
    latents = paint(Spot(0, 1, None, device), case)["latents"]
    assert latents is not None
    return latents


def apart(found: np.ndarray, right: np.ndarray) -> float:
    """The largest difference, as a share of the largest value; infinite where a number is none."""
    if found.shape != right.shape or not (np.isfinite(found).all() and np.isfinite(right).all()):
        return float("inf")
    return float(np.abs(found - right).max() / np.abs(right).max())


def painted_by(answers: list[Any]) -> np.ndarray:
    """The latents of the rank that put them out."""
    (latents,) = [answer.value["latents"] for answer in answers if answer.value["latents"] is not None]
    return latents
