"""Refuses a layout that cannot fit a model by its configuration files alone, before any process is started."""

from __future__ import annotations

import json
from pathlib import Path

from patchpipe.balance import check_stages
from patchpipe.config import ParallelConfig
from patchpipe.models import plan_for
from patchpipe.refusals import check_divisible, heads_of, no_tensor_plan
from patchpipe.source import read_index


def check_folder(folder: Path, config: ParallelConfig) -> None:
    """Checks what a pipeline's configuration tells; what it leaves open is checked when the ranks load it.

    Raises:
        UnsupportedModel: The transformer's class has no plan, or not as it is configured.
        ValueError: More stages than blocks, heads that do not divide, or a method that the plan lacks.
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
    if config.tensor > 1 and plan.tensor is None:
        raise no_tensor_plan(plan, config.tensor)
    heads = settings.get("num_attention_heads")
    if heads:
        check_divisible(config.tensor, {heads: heads_of(plan, heads)})
