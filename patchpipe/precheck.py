"""Refuses a layout that cannot fit a model by its configuration files alone, before any process is started."""

from __future__ import annotations

import json
from pathlib import Path

from patchpipe.balance import check_stages
from patchpipe.config import ParallelConfig
from patchpipe.models import plan_for
from patchpipe.source import read_index


def check_folder(folder: Path, config: ParallelConfig) -> None:
    """Checks what a pipeline's configuration tells; what it leaves open is checked when the ranks load it.

    Raises:
        UnsupportedModel: The transformer's class has no plan, or not as it is configured.
        ValueError: More stages than blocks, or heads that do not divide.
    """
    _, name = read_index(folder).get("transformer") or (None, None)
    path = folder / "transformer" / "config.json"
    if name is None or not path.is_file():
        return
    plan, settings = plan_for(name), json.loads(path.read_text(encoding="utf-8"))
    plan.check_settings(settings)
    counts = [settings.get(listing.count) for listing in plan.blocks]
    if None not in counts:
        check_stages(config, sum(counts), plan)
    heads = settings.get("num_attention_heads")
    if heads and heads % config.tensor:
        raise ValueError(
            f"tensor={config.tensor} does not divide the {heads} attention heads of {plan.model}: "
            f"use a divisor of {heads}"
        )
