"""The policies: each plans what should run on how many devices, from what it sees of the state."""

from __future__ import annotations

from patchpipe.scheduling.policies.balanced import Balanced
from patchpipe.scheduling.policies.genserve import Genserve
from patchpipe.scheduling.policies.ordered import ORDERED, Ordered
from patchpipe.scheduling.policies.view import Policy, View, Wish

__all__ = ["POLICIES", "Balanced", "Genserve", "Ordered", "Policy", "View", "Wish", "policy_named"]

POLICIES = (*ORDERED, "genserve", "balanced")


def policy_named(name: str, degree: int = 1) -> Policy:
    """A policy by its short name.

    Args:
        name: One of ``POLICIES``.
        degree: Devices of a clip where the policy does not choose them.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in POLICIES:
        raise ValueError(f"policy {name} must be one of {', '.join(POLICIES)}")
    if name in ORDERED:
        return Ordered(name, degree)
    return Genserve() if name == "genserve" else Balanced()
