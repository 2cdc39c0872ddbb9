"""``patchpipe models``: what can be spread over devices."""

from __future__ import annotations

EPILOG = """
[bold]Example[/]

  [green]patchpipe models[/]
"""


def models() -> None:
    """List the transformer classes that patchpipe can spread over devices."""
    from patchpipe.models import supported

    for name in supported():
        print(name)
