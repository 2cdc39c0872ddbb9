"""Refuses a layout that cannot fit a model by its configuration files alone, before any process is started."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchpipe.config import ParallelConfig
from patchpipe.loading.quantised import check_recipe
from patchpipe.loading.source import read_index
from patchpipe.models import plan_for
from patchpipe.models.matrix import check_tested
from patchpipe.parallel.refusals import check_divisible, check_special, heads_of, no_tensor_plan
from patchpipe.stage.balance import check_stages


def check_folder(folder: Path, config: ParallelConfig, options: Mapping[str, Any] | None = None) -> None:
    """Checks what a pipeline's configuration tells; what it leaves open is checked when the ranks load it.

    Args:
        folder: The pipeline.
        config: The layout.
        options: Options of ``from_pretrained``, such as ``quantization_config``.

    Raises:
        UnsupportedModel: The transformer's class has no plan, or not as it is configured.
        ValueError: More stages than blocks, heads that do not divide, a method that the plan lacks, or weights
            quantised in a way that is not served.
    """
    _, name = read_index(folder).get("transformer") or (None, None)
    path = folder / "transformer" / "config.json"
    if name is None or not path.is_file():
        return
    plan, settings = plan_for(name), json.loads(path.read_text(encoding="utf-8"))
    plan.check_settings(settings)
    if check_recipe(settings, (options or {}).get("quantization_config"), config) is not None:
        check_tested(plan.model, "quantised", "a transformer with quantised weights", "load the weights whole")
    counts = [_count(settings.get(listing.count)) for listing in plan.blocks]
    if None not in counts:
        check_stages(config, sum(count or 0 for count in counts), plan)
    check_special(plan, config)
    if config.tensor > 1 and plan.tensor is None:
        raise no_tensor_plan(plan, config.tensor)
    heads = settings.get("num_attention_heads")
    if heads:
        check_divisible(config.tensor, {heads: heads_of(plan, heads)})


def _count(told: Any) -> int | None:
    """How many blocks a list has: a number, or an entry for each."""
    return len(told) if isinstance(told, list) else told


def quantised(folder: Path, options: Mapping[str, Any]) -> bool:
    """Whether the weights of a pipeline's transformer are quantised, or are to be."""
    path = folder / "transformer" / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return bool(settings.get("quantization_config") or options.get("quantization_config"))
