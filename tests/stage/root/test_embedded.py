"""What the root makes of a patch's latent: of the patch's rows alone, whatever a class does with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.models import plan_for
from patchpipe.stage.root.embedded import PatchRows, embedding, of_rows
from tests import tiny
from tests.models.test_family_features import several
from tests.support.parity import call_pipeline
from tests.support.ranks import quieten
from tests.tiny import images as tiny_images

SPAN = (4, 8)  # of eight rows of the latent, or the last two of four rows of tokens
TOKENS = (6, 12)
POSITIONS = torch.arange(12.0 * 5).reshape(1, 12, 5)


def setup_module() -> None:
    quieten()


class Padded(nn.Conv2d):
    """Sees rows of others."""

    def forward(self, given: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(given, (0, 0, 1, 1)))


def convolution() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 5, 2, 2)


def both(finish: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """What comes of a latent that is zeros but for a patch: embedded by its rows, and as the class does."""
    module, latent = convolution(), torch.zeros(1, 3, 8, 6)
    latent[:, :, slice(*SPAN)] = torch.randn(1, 3, 4, 6)
    with torch.inference_mode():
        return finish(of_rows(module, 2, lambda given: SPAN)(latent)), finish(module(latent))


def tokens(embedded: Tensor) -> Tensor:
    return embedded.flatten(2).transpose(1, 2)


KEEPING: dict[str, Callable[[Tensor], Tensor]] = {
    "positions": lambda given: (tokens(given) + POSITIONS).to(torch.float64),
    "a position for all": lambda given: tokens(given) + POSITIONS[:, :1],
    "positions without a batch": lambda given: tokens(given) + POSITIONS[0],
    "a number": lambda given: tokens(given) + 1.5,
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "joined with text": lambda given: torch.cat((torch.ones(1, 2, 5), tokens(given)), 1)[:, 2:],
    "reshaped": lambda given: given.reshape(1, 5, 12).transpose(1, 2),
    "in place": lambda given: changed(tokens(given)),
    "two of them": lambda given: tokens(given) + tokens(given),
    "scaled": lambda given: tokens(given) * 2,
    "weighed": lambda given: torch.add(tokens(given), POSITIONS, alpha=0.5),
    "named": lambda given: torch.flatten(input=given, start_dim=2).transpose(1, 2),
}


def changed(rows: Tensor) -> Tensor:
    rows[:, 7:] += 3.0
    rows.mul_(2.0)
    return rows


@pytest.mark.parametrize("name", KEEPING)
def test_rows_are_kept_apart_and_are_those_of_the_whole(name: str) -> None:
    found, expected = both(KEEPING[name])
    assert isinstance(found, PatchRows)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    rows = found.narrow(1, TOKENS[0], TOKENS[1] - TOKENS[0])
    assert not isinstance(rows, PatchRows)
    torch.testing.assert_close(rows, expected[:, slice(*TOKENS)])
    assert found.wide is None, "the whole was made of them"


@pytest.mark.parametrize("name", [*KEEPING, *OTHERS])
def test_any_other_operation_finds_the_rows_in_the_whole(name: str) -> None:
    found, expected = both({**KEEPING, **OTHERS}[name])
    plain = found * 1.0
    assert not isinstance(plain, PatchRows)
    torch.testing.assert_close(plain[:, slice(*TOKENS)], expected[:, slice(*TOKENS)])


def test_other_rows_than_the_patchs_are_zeros() -> None:
    found, _ = both(tokens)
    assert torch.equal(found.narrow(1, 0, TOKENS[0]), torch.zeros(1, 6, 5))
    assert found.narrow(1, TOKENS[0] - 1, 7).shape == (1, 7, 5)


@pytest.mark.parametrize(
    ("module", "parts"),
    [
        (nn.Conv2d(3, 5, 2, 2), True),
        (nn.Conv2d(3, 5, (2, 3), (2, 1), padding=(0, 1)), True),  # columns may overlap
        (nn.Conv2d(3, 5, 3, 1, padding=1), False),
        (nn.Conv2d(3, 5, 3, 2), False),
        (nn.Conv2d(3, 5, 2, 2, dilation=2), False),
        (nn.Conv2d(3, 5, 1, padding="same"), False),
        (Padded(3, 5, 2, 2), False),
        (nn.Linear(3, 5), False),
    ],
)
def test_only_convolutions_that_part_rows_embed_them_apart(module: nn.Module, parts: bool) -> None:
    assert bool(embedding(nn.Sequential(module), 2)) is parts


# -- in models -------------------------------------------------------------------------------------

APART = ("sd3", "pixart", "hunyuan-dit", "dit", "hunyuan-image", "wan", "hunyuan-video")
JOINED = ("ernie", "wan-animate", "helios")  # whose root does more with them than these operations


@pytest.mark.parametrize("name", [*APART, *JOINED])
def test_a_patch_that_streams_has_its_own_rows_embedded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_images.settled(tiny.pipeline(name))
    patchpipe.parallelize(pipe, ParallelConfig(patches=2, warmup=1))
    plan = plan_for(pipe.transformer)
    [module] = embedding(pipe.transformer.get_submodule(plan.embed_of(pipe.transformer)), plan.grid.dim)
    seen: list[int] = []
    compute = module._conv_forward

    def noted(given: Tensor, *args: Any) -> Tensor:
        seen.append(given.shape[plan.grid.dim])
        return compute(given, *args)

    monkeypatch.setattr(module, "_conv_forward", noted)
    widened: list[PatchRows] = []
    among_zeros = PatchRows.among_zeros
    monkeypatch.setattr(PatchRows, "among_zeros", lambda rows: (widened.append(rows), among_zeros(rows))[1])
    call_pipeline(pipe, several(pipe, name))
    rows = [each for each in seen if each < max(seen)]
    assert rows, "patches were embedded with all rows"
    assert sum(rows) % max(seen) == 0, "all patches are not the whole"
    assert bool(widened) is (name in JOINED)
