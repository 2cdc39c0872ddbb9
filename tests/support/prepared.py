"""What the processes of ranks have in common, loaded before they are forked from one process."""

from __future__ import annotations

import gc

gc.disable()  # nothing of what is loaded goes away

import diffusers  # noqa: F401
import pytest  # noqa: F401
import torch
import transformers  # noqa: F401

import patchpipe.pipeline.pretrained  # noqa: F401
from tests import tiny
from tests.support import parity  # noqa: F401
from tests.support.ranks import quieten

MODELS = [*((name, torch.float32) for name in tiny.MODELS), *((name, torch.float64) for name in ("flux", "sd3"))]


def prepare() -> None:
    """Ranks copy these pipelines, and start with the generator as a fresh process has it."""
    quieten()
    drawn = torch.get_rng_state()
    for name, dtype in MODELS:
        tiny.pipeline(name, dtype=dtype)
    torch.set_rng_state(drawn)


prepare()
gc.collect()
gc.freeze()
gc.enable()
