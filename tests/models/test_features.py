"""Every feature of diffusers' pipelines on four families: tested, refused with a reason, or not offered; see there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import patchpipe
from patchpipe import ParallelConfig
from tests import tiny
from tests.models import features
from tests.models.features import CALLS, FAMILIES, FEATURES, Call, Here, Not
from tests.pipeline.test_pipelines import attach
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads

CELLS = [
    (feature, family, cell) for feature, row in FEATURES.items() for family, cell in zip(FAMILIES, row, strict=True)
]


def setup_module() -> None:
    quieten()


def made(call: Call) -> Any:
    """A tiny pipeline of the class that is called."""
    pipe = tiny.pipeline(call.model)
    own = {"scheduler": getattr(diffusers, call.scheduler)()} if call.scheduler else {}
    return getattr(diffusers, call.pipeline or type(pipe).__name__).from_pipe(pipe, **own)


def latents(pipe: Any, call: Call) -> np.ndarray | None:
    known = features.parameters_of(type(pipe))
    wanted = {**tiny.call_arguments(call.model), **call.changes}
    wanted = {name: value for name, value in wanted.items() if name in known}
    assert set(call.changes) <= set(wanted), "an argument of the call is not the pipeline's"
    pipe.set_progress_bar_config(disable=True)
    output = pipe(**wanted, generator=torch.Generator().manual_seed(0), output_type="latent")
    return None if output is None else np.asarray(tiny.painted(output))


def painted(place: Place, call: Call) -> tuple[np.ndarray | None, np.ndarray | None]:
    """With synchronous steps, and with patches that stream."""
    pipe = attach(made(call), place)
    exact = latents(pipe, call)
    attach(patchpipe.restore(pipe), place, split_batch=False, **call.schedule)
    return exact, latents(pipe, call)


@pytest.mark.some(of=3)
@pytest.mark.parametrize("title", CALLS)
def test_a_call_is_exact_and_streams_as_one_process_does(title: str) -> None:
    call = CALLS[title]
    pipe = made(call)
    exact = latents(pipe, call)
    assert exact is not None
    found, both = run_threads(2, painted, call)[0]
    assert np.array_equal(found, exact)
    patchpipe.parallelize(pipe, ParallelConfig(split_batch=False, **call.schedule))
    alone = latents(pipe, call)
    assert np.array_equal(alone, both)
    assert np.isfinite(alone).all()
    assert not np.array_equal(alone, exact), "nothing was stale: nothing was tested"


def test_every_cell_is_as_the_table_says() -> None:
    """Calls are painted above, tests elsewhere exist, and what is not offered has neither an argument nor a class."""
    for feature, family, cell in CELLS:
        at = f"{feature}, {family}"
        if isinstance(cell, Here):
            assert cell.call in CALLS, at
        elif isinstance(cell, Not):
            kinds = classes(FAMILIES[family])
            assert not [kind for kind in kinds if cell.argument in features.parameters_of(kind)], at
            assert not [kind for kind in kinds if cell.named and re.search(cell.named, kind.__name__)], at
        else:
            file, name = cell.test.split("::")
            assert f"def {name}(" in (Path(__file__).parents[1] / file).read_text(encoding="utf-8"), at
    assert set(CALLS) == {cell.call for *_, cell in CELLS if isinstance(cell, Here)}, "a call that no cell names"


def classes(family: str) -> list[type]:
    """The pipeline classes of diffusers for a family's transformer."""
    names = [name for name in dir(diffusers) if re.fullmatch(rf"{family}(?![0-9]).*(?<!Modular)Pipeline", name)]
    found = [getattr(diffusers, name) for name in names]
    assert found
    return found


def test_the_page_has_the_table() -> None:
    written = features.PAGE.read_text(encoding="utf-8") == features.page()
    assert written, "docs/pipelines.md is not as tests/models/features.py has it: run `python -m tests.models.features`"
