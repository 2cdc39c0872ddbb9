"""The ways to run one pipeline that a bench compares: same weights, same threads, same pipeline code.

``plain-beside`` is plain diffusers on every rank at once, each with a picture of its own: what ranks cost each other by
merely working at the same time, which no parallel method can undo.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

import patchpipe
from bench.shapes import SHAPES
from patchpipe import ParallelConfig
from tests.support.ranks import Place

PLAIN, BESIDE, THEIRS = "plain", "plain-beside", "diffusers-ulysses"
NOT_OURS = (PLAIN, BESIDE, THEIRS)  # what they wait and send is not counted
COMPILED = "+compiled"
OURS = ("pipefusion", "ulysses", "ring", "tensor", "distrifusion")
EVERY = (PLAIN, BESIDE, *OURS, THEIRS)
TIMEOUT = 600.0
AS_MEASURED: dict[str, Any] = {"warmup": 1, "forecast": False}  # what all figures are about, unless they say so


def known(names: list[str]) -> list[str]:
    """The names, checked: one of ``EVERY``, or ``pipefusion:4`` for four patches; ``+compiled`` after one of ours.

    Raises:
        ValueError: A name is unknown.
    """
    for name in names:
        method, _, patches = name.removesuffix(COMPILED).partition(":")
        if name.endswith(COMPILED) and method not in OURS:
            raise ValueError(f"{name!r} is no contender: only {', '.join(OURS)} can be compiled")
        if method not in EVERY or (patches and (method != "pipefusion" or not patches.isdigit())):
            raise ValueError(f"{name!r} is no contender: use {', '.join(EVERY)}, or pipefusion:4 for four patches")
    return names


def as_options(names: list[str] | None) -> str:
    """The contenders a command was given, as the end of that command; nothing where it took its usual ones."""
    return "".join(f" --method {name}" for name in names or [])


class Contender:
    """One of the ways, on one rank; ``with`` closes it, its connections and their threads too.

    Args:
        name: See ``known``.
        shape: The model.
        place: This rank's place.
        steps: Denoising steps; ``None`` takes the shape's.
    """

    def __init__(self, name: str, shape: str, place: Place, steps: int | None = None) -> None:
        self.name, self.place = name, place
        self.pipe, self.call = SHAPES[shape].build()
        if steps is not None:
            self.call["num_inference_steps"] = steps
        method, _, patches = name.removesuffix(COMPILED).partition(":")
        if method in OURS:
            compiled = name.endswith(COMPILED)
            options: dict[str, Any] = {method: place.world_size, "timeout": TIMEOUT, "compile": compiled}
            config = ParallelConfig(**{**AS_MEASURED, **options}, patches=int(patches) if patches else None)
            patchpipe.parallelize(self.pipe, config, group=place.join(config))
        elif method == THEIRS:
            _join_default_group(place)
            with _accelerator_for_cpu():
                self.pipe.transformer.enable_parallelism(
                    config=ContextParallelConfig(ulysses_degree=place.world_size, ulysses_anything=True)
                )

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self.pipe, "patchpipe"):
            patchpipe.restore(self.pipe)
        if dist.is_initialized():
            dist.destroy_process_group()
        del self.pipe
        gc.collect()

    @property
    def idle(self) -> bool:
        """Whether this rank has no part in it."""
        return self.name == PLAIN and self.place.rank > 0

    def run(self, steps: int | None = None) -> Any:
        """One request, of fewer steps if told."""
        call = self.call if steps is None else {**self.call, "num_inference_steps": steps}
        return self.pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent")

    def figures(self) -> dict[str, Any]:
        """What it tells of its last request, beside the time."""
        if self.name.removesuffix(COMPILED).partition(":")[0] not in OURS:
            return {"waited": 0.0, "sent_bytes": 0, "patches": 1}
        last = self.pipe.patchpipe.last
        return {"waited": last.waited_seconds, "sent_bytes": last.sent_bytes, "patches": last.patches}


def _join_default_group(place: Place) -> None:
    """diffusers wants the process-wide group."""
    number = place.store.add(f"default/{place.rank}", 1)  # of as many as there were before
    store = dist.PrefixStore(f"default/{number}", place.store)
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world_size)


@contextmanager
def _accelerator_for_cpu() -> Iterator[None]:
    """diffusers' context parallelism asks how many accelerators there are; a CPU has none."""
    count: Callable[[], int] = lambda: 1  # noqa: E731
    cpu: Callable[[], torch.device] = lambda: torch.device("cpu")  # noqa: E731
    with mock.patch("torch.accelerator.device_count", count), mock.patch("torch._C._get_accelerator", cpu):
        yield
