"""``patchpipe models``: what can be spread over devices, and how."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from patchpipe.layout.axes import DEGREES
from patchpipe.layout.combinations import TESTED

EPILOG = """
[bold]Example[/]

  [green]patchpipe models[/]
"""


def models() -> None:
    """List the transformer classes that patchpipe can spread over devices, and by which methods."""
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
