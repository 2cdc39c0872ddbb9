"""The matrix of models and features, from the tables that the tests run over and the rules by which the engine refuses.

    python -m tools.matrix          # the table
    python -m tools.matrix --write  # into patchpipe/models/matrix.json and docs/models.md

What the engine refuses is asked of the engine, with the tests of today and not with those in the file. A test of what
is refused so far needs ``--write`` before it can run: its table is what counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
from diffusers.loaders import PeftAdapterMixin

from patchpipe import OffloadConfig, ParallelConfig, models
from patchpipe.models import PLANS
from patchpipe.models.matrix import COLUMNS, check_tested
from patchpipe.models.plan import ModelPlan
from patchpipe.models.refused import REFUSED
from patchpipe.parallel.refusals import check_special, no_tensor_plan
from patchpipe.recipes.checks import RECIPES
from patchpipe.stage.balance import check_stages
from tests.support.evidence import evidence, kind_of, transformer_of
from tools.documents import replaced

ROOT = Path(__file__).resolve().parents[1]
PAGE, DATA = ROOT / "docs" / "models.md", ROOT / "patchpipe" / "models" / "matrix.json"
STREAMS: dict[str, Any] = {"pipefusion": 2, "patches": 2}
ASKED: dict[str, dict[str, Any]] = {
    **{degree: {degree: 2} for degree in ("pipefusion", "ulysses", "ring", "tensor", "cfg", "data", "distrifusion")},
    "forecast": {**STREAMS, "forecast": True},
    "streamed": {**STREAMS, "warmup": "streamed"},
    "text_patches": {**STREAMS, "text_patches": 2},
    "compile": {"compile": True},
    "offload": {"offload": OffloadConfig()},
}


def tested() -> dict[str, dict[str, dict[str, set[str]]]]:
    """By transformer class and column, the tests that run it, and the pipelines they run it with."""
    found: dict[str, dict[str, dict[str, set[str]]]] = {}
    for each in evidence():
        for name in each.names:
            kind = kind_of(name)
            cells = found.setdefault(transformer_of(kind), {})
            for column in each.shows:
                cell = cells.setdefault(column, {"tested": set(), "pipelines": set()})
                cell["tested"].add(each.where)
                cell["pipelines"].add(kind.__name__)
    return found


def refusal(plan: ModelPlan, column: str) -> str | None:
    """What the engine says to a column with a class, if it refuses it."""
    asked = [lambda: _by_kind(plan, column)]
    if column in ASKED:
        config = ParallelConfig(**ASKED[column])
        asked += [lambda: check_stages(config, 99, plan), lambda: check_special(plan, config)]
    return next((told for told in map(_told, asked) if told is not None), None)


def _by_kind(plan: ModelPlan, column: str) -> None:
    """What the engine asks of a class alone."""
    if column == "tensor" and plan.tensor is None:
        raise no_tensor_plan(plan, 2)
    if column == "references" and not plan.grid.references:
        raise ValueError("its latent is followed by no other picture")
    if column == "lora" and not issubclass(getattr(diffusers, plan.model), PeftAdapterMixin):
        raise ValueError("the class takes no LoRA in diffusers")
    if column in ("quantised", "together"):
        check_tested(plan.model, column, column, "leave it out")


def _told(check: Callable[[], None]) -> str | None:
    try:
        check()
    except ValueError as error:
        return str(error)
    return None


def made() -> dict[str, Any]:
    """The matrix.

    Raises:
        ValueError: A cell is neither tested nor refused.
    """
    shown = tested()
    known = {plan.model: {"cells": shown.get(plan.model, {})} for plan in PLANS}
    with mock.patch.object(models.matrix, "matrix", return_value={"classes": known}):
        classes = {plan.model: _row(plan, shown.get(plan.model, {})) for plan in PLANS}
    if open_cells := [
        f"{name}: {column}" for name, row in classes.items() for column in COLUMNS if not row["cells"][column]
    ]:
        raise ValueError("neither tested nor refused: " + "; ".join(open_cells))
    recipes = {
        recipe.name: f"{recipe.reason}: {recipe.instead}"
        for recipe in RECIPES
        if not recipe.fits(ParallelConfig(**STREAMS))
    }
    return {"columns": dict(COLUMNS), "classes": classes, "recipes": recipes, "refused_classes": dict(REFUSED)}


def _row(plan: ModelPlan, shown: Mapping[str, Mapping[str, set[str]]]) -> dict[str, Any]:
    """A class's row: an empty cell is neither tested nor refused."""
    cells: dict[str, Any] = {}
    for column in COLUMNS:
        if column in shown:
            cells[column] = {key: sorted(values) for key, values in shown[column].items()}
        else:
            told = refusal(plan, column)
            cells[column] = {} if told is None else {"refused": told}
    return {"pipelines": list(plan.pipelines), "cells": cells}


def written(found: Mapping[str, Any]) -> str:
    """As it stands in the file."""
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def table(found: Mapping[str, Any]) -> str:
    """The table in docs/models.md: a mark where a test runs it, a number where it is refused for a reason below."""
    columns, reasons, rows = list(found["columns"]), {}, []
    for model, row in found["classes"].items():
        marks = []
        for column in columns:
            cell = row["cells"][column]
            reason = cell.get("refused", "").replace(model, "the class")
            marks.append("✓" if "tested" in cell else f"{reasons.setdefault(reason, len(reasons) + 1)}")
        rows.append(f"| `{model}` | {' | '.join(marks)} |\n")
    states = [cell for row in found["classes"].values() for cell in row["cells"].values()]
    count = sum("tested" in cell for cell in states)
    return (
        f"{len(states)} cells: {count} tested (✓), {len(states) - count} refused, with the number of the reason.\n\n"
        f"| class | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}\n{''.join(rows)}\n"
        + "".join(f"{number}. {reason}\n" for reason, number in reasons.items())
        + "\nWith every class, while patches stream:\n\n| refused | why, and what to do instead |\n| --- | --- |\n"
        + "".join(f"| {name} | {why} |\n" for name, why in found["recipes"].items())
    )


def main() -> None:
    """Prints the table, or writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the data and the table")
    found, write = made(), parser.parse_args().write
    if not write:
        print(table(found))
        return
    DATA.write_text(written(found), encoding="utf-8")
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), "matrix", table(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
