"""Copies that tests make of pipelines: as built, and nobody else's."""

from __future__ import annotations

import torch

from tests import tiny
from tests.support.copies import Original


def test_a_copy_is_as_built_and_shares_nothing() -> None:
    built = tiny._pipeline("flux", 4, torch.float32, 0)
    drawn = torch.rand(2)
    copies = [tiny.pipeline("flux") for _ in range(2)]
    assert torch.equal(torch.rand(2), drawn), "the process's generator stands where building leaves it"
    for part, module in built.components.items():
        if isinstance(module, torch.nn.Module):
            one, other = (getattr(copy, part).state_dict() for copy in copies)
            assert [*module.state_dict()] == [*one]
            assert all(torch.equal(tensor, one[name]) for name, tensor in module.state_dict().items())
            assert not {each.data_ptr() for each in one.values()} & {each.data_ptr() for each in other.values()}
    assert copies[0].tokenizer is not copies[1].tokenizer
    assert copies[0].tokenizer(tiny.PROMPT) == built.tokenizer(tiny.PROMPT)


def test_what_has_two_names_stays_one() -> None:
    tied = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    tied[1].weight = tied[0].weight
    original = Original(tied)
    with torch.no_grad():
        tied[0].weight.zero_()
    copied = original.copy()
    assert copied[0].weight is copied[1].weight
    assert copied[0].weight.abs().sum() > 0
