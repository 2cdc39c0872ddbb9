"""Guiders of modular pipelines: those that combine predictions work; those that change layers are refused."""

from __future__ import annotations

from typing import Any

from diffusers import BaseGuidance


def check_guiders(pipe: Any) -> None:
    """Refuses a guider that changes layers of the transformer for some of its calls.

    Raises:
        ValueError: Names it, and what to use.
    """
    for name, part in list(vars(pipe).items()):
        kind: Any = type(part)
        if isinstance(part, BaseGuidance) and kind.cleanup_models is not BaseGuidance.cleanup_models:
            raise ValueError(
                f"the {name} {kind.__name__} changes layers of the transformer in some of its calls, and a rank has "
                f"only its own: use a guider that only combines predictions, such as ClassifierFreeGuidance or "
                f"AdaptiveProjectedGuidance, or run the pipeline on one device"
            )
