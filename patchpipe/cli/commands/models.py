"""``patchpipe models``: what can be spread over devices, and how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from patchpipe.layout.axes import DEGREES
from patchpipe.layout.combinations import TESTED

EPILOG = """
[bold]Example[/]

  [green]patchpipe models[/]

  Every class with every method and feature, tested or refused:

  [green]patchpipe models[/] --matrix
"""

Matrix = Annotated[bool, typer.Option("--matrix", help="Every class with every feature: tested, or refused and why.")]
AsJson = Annotated[bool, typer.Option("--json", help="The same with the tests' names, as JSON.")]


def models(matrix: Matrix = False, as_json: AsJson = False) -> None:
    """List the transformer classes that patchpipe can spread over devices, and by which methods."""
    from patchpipe.models import matrix as known

    if as_json:
        print(json.dumps(known.matrix(), indent=1, ensure_ascii=False))
    elif matrix:
        _show_matrix(known.matrix())
    else:
        _show_classes()


def _show_matrix(found: Mapping[str, Any]) -> None:
    """A line for each class: what tests run with it, and what is refused, by the number of its reason."""
    console, reasons = Console(highlight=False), dict[str, int]()
    table = Table("transformer", "tested", "refused", box=box.SIMPLE_HEAD)
    for model, row in found["classes"].items():
        refused = []
        for column, cell in row["cells"].items():
            if "refused" in cell:
                reason = cell["refused"].replace(model, "the class")
                refused.append(f"{column} ({reasons.setdefault(reason, len(reasons) + 1)})")
        tested = [column for column, cell in row["cells"].items() if "tested" in cell]
        table.add_row(model, " · ".join(tested), " · ".join(refused))
    console.print(table)
    for text, number in reasons.items():
        console.print(f"  ({number}) {text}", markup=False)
    console.print("Columns:")
    for column, meaning in found["columns"].items():
        console.print(f"  {column}: {meaning}", markup=False)


def _show_classes() -> None:
    from patchpipe.models import PLANS

    console = Console(highlight=False)
    table = Table("transformer", "pipelines tested", "methods", box=box.SIMPLE_HEAD)
    for plan in PLANS:
        methods = [method for method in DEGREES if method != "tensor" or plan.tensor is not None]
        table.add_row(plan.model, "\n".join(plan.pipelines), " · ".join(methods))
    console.print(table)
    console.print("Methods that may be multiplied, each product compared with one process by a test:")
    for product in TESTED:
        console.print("  " + " × ".join(method for method in DEGREES if method in product))
