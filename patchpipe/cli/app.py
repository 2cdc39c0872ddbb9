"""The Typer application, and how it ends: a status, and one line where something is wrong."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from patchpipe.errors import PatchpipeError, UnsupportedModel
from patchpipe.version import __version__

DEBUG_FLAG = "--debug"
BAD_INPUT = 2
FAILURE = 1
INTERRUPTED = 130

_USAGE_ERROR = next(one for one in typer.BadParameter.__mro__ if one.__name__ == "ClickException")
_EPILOG = """
[bold]Examples[/]

  [green]patchpipe demo[/]

  [green]patchpipe generate[/] "red heart, flat style"

  [green]patchpipe generate[/] "red apple, 3d style" "owl, flat style" --pipefusion 2 --compare

  [green]patchpipe plan[/] --model flux.1-dev --devices 8 --device l40

  [green]patchpipe serve[/] ./FLUX.1-dev

  [green]patchpipe info[/] black-forest-labs/FLUX.1-dev --pipefusion 4
"""


class App(typer.Typer):
    """A Typer application that tells every error in one line and returns the exit status."""

    def __call__(self, *args: Any, **kwargs: Any) -> int:
        """Runs the command line given, by default the process's own, and returns its exit status."""
        given = list(kwargs.get("args") or (args[0] if args else None) or sys.argv[1:])
        command = typer.main.get_command(self)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal that knows no "×" shows "?"
        try:
            status = command.main(args=given, prog_name="patchpipe", standalone_mode=False)
        except BaseException as error:
            if DEBUG_FLAG in given and isinstance(error, Exception):
                raise
            return _tell(error)
        if status == INTERRUPTED:  # Typer's way to tell of a Ctrl-C
            _complain("stopped")
        return status if isinstance(status, int) else 0


app = App(
    name="patchpipe",
    help="Any diffusers pipeline, unmodified, on N devices.",
    epilog=_EPILOG,
    no_args_is_help=False,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"patchpipe {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Any diffusers pipeline, unmodified, on N devices."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def _tell(error: BaseException) -> int:
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        _complain("stopped")
        return INTERRUPTED
    if isinstance(error, _USAGE_ERROR):
        _complain(error.format_message())  # type: ignore[attr-defined]
        return BAD_INPUT
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILURE
    if isinstance(error, (ValueError, TypeError, FileNotFoundError, UnsupportedModel)):
        _complain(str(error))
        return BAD_INPUT
    name = "" if isinstance(error, PatchpipeError) else f"{type(error).__name__}: "
    _complain(f"{name}{error} ({DEBUG_FLAG} shows more)")
    return FAILURE


def _complain(text: str) -> None:
    line = " ".join(text.split())
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] [red]{escape(line)}[/]")
