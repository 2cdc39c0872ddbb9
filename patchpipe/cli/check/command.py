"""``patchpipe check``: whether a model keeps the laws of the patch pipeline, and a plan for one that has none."""

from __future__ import annotations

import ast
import json
import os
import sys
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchpipe.cli import options
from patchpipe.cli.check.show import Show

if TYPE_CHECKING:
    from patchpipe.checking.report import Report

EPILOG = """
[bold]Examples[/]

  [green]patchpipe check[/] FluxTransformer2DModel                    a class of diffusers

  [green]patchpipe check[/] ./FLUX.1-dev                              a model of your own

  [green]patchpipe check[/] Flux3Transformer2DModel                   a class without a plan: proposes one, and tries it

  [green]patchpipe check[/] PixArtTransformer2DModel --propose        a proposal, although the class has a plan

  [green]patchpipe check[/] DiTTransformer2DModel --set num_layers=6 --json
"""
FAILED = 1

Subject = Annotated[str, typer.Argument(metavar="MODEL_DIR_OR_CLASS", help="A model's folder, or a transformer class.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A field of the tiny model's configuration. May be repeated."),
]
Propose = Annotated[
    bool, typer.Option("--propose", help="Propose a plan even if the class has one, and try the proposal.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print what was found as JSON, and nothing else.")]


def check(
    model: Subject,
    set_: Set = None,
    propose: Propose = False,
    as_json: AsJson = False,
    _debug: options.Debug = False,
) -> None:
    """Try the laws of the patch pipeline on a tiny random copy of a model; propose a plan for a new one.

    The copy has few blocks, two heads and random weights; its ranks are threads of this process. So it takes seconds
    and no GPU, and a class alone needs no files. The exit status is 0 if nothing fails.
    """
    settings = dict(_setting(text) for text in set_ or [])
    _prepare()
    show = Show(quiet_stdout=as_json)
    report = _checked(model, settings, propose, show)
    if as_json:
        json.dump(report.as_dict(), sys.stdout, indent=2)
        print()
    if not report.holds:
        raise typer.Exit(FAILED)


def _setting(text: str) -> tuple[str, Any]:
    name, given, value = text.partition("=")
    if not given or not name.isidentifier():
        raise ValueError(f"--set {text} must look like NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _prepare() -> None:
    """Before torch is imported: products of matrices that do not depend on where a matrix lies in memory."""
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    warnings.simplefilter("ignore")


def _checked(model: str, settings: dict[str, Any], propose: bool, show: Show) -> Report:
    with show.waiting("loading the libraries"):
        from patchpipe.checking.laws import LAWS
        from patchpipe.checking.report import checked, quiet  # heavy, and not needed to refuse bad input
    with quiet(), show.progress(len(LAWS)) as tell:
        report = checked(model, settings, propose=propose, tell=tell)
    show.report(report)
    return report
