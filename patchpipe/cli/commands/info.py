"""``patchpipe info``: a model's blocks and plan, and what each rank would hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from patchpipe.cli import options
from patchpipe.cli.figures import count, size
from patchpipe.demo import MODEL_DIR
from patchpipe.loading.source import resolve_source

if TYPE_CHECKING:
    from patchpipe.config import ParallelConfig
    from patchpipe.planner.work.describe import ModelInfo

EPILOG = """
[bold]Examples[/]

  [green]patchpipe info[/]

  [green]patchpipe info[/] ./sd3-medium --pipefusion 4

  [green]patchpipe info[/] ./flux-dev --pipefusion 2 --stage-blocks 20,37
"""


def info(
    model: options.ModelArgument = None,
    variant: options.Variant = None,
    revision: options.Revision = None,
    pipefusion: options.Pipefusion = 1,
    cfg: options.Cfg = 1,
    data: options.Data = 1,
    ulysses: options.Ulysses = 1,
    ulysses_inner: options.UlyssesInner = 1,
    values_first: options.ValuesFirst = False,
    changed_tokens: options.ChangedTokens = None,
    compress: options.Compress = None,
    ring: options.Ring = 1,
    tensor: options.Tensor = 1,
    distrifusion: options.Distrifusion = 1,
    parallel_vae: options.ParallelVae = False,
    stage_blocks: options.StageBlocks = None,
    output_rank: options.OutputRank = 0,
    text_rank: options.TextRank = None,
    _debug: options.Debug = False,
) -> None:
    """Show a model's blocks, parameters and plan, and what each rank would hold."""
    given = locals()
    config = options.read_config(given)
    source = resolve_source(model or MODEL_DIR, revision=revision)
    revision = revision if source.folder is None else None
    _show(source.path, _describe(source.path, config, variant, revision))


def _describe(path: str, config: ParallelConfig, variant: str | None, revision: str | None) -> ModelInfo:
    from patchpipe.planner.work.describe import describe_model  # heavy, and not needed to refuse bad input

    return describe_model(path, config, variant, revision)


def _show(path: str, model: ModelInfo) -> None:
    console = Console(highlight=False)
    head = Table.grid(padding=(0, 2))
    head.add_column(style="dim")
    head.add_column(overflow="fold")
    head.add_row("model", path)
    head.add_row("pipeline", model.pipeline_class)
    head.add_row("transformer", model.transformer_class)
    head.add_row("parameters", f"{count(model.parameters)} · {model.dtype}")
    head.add_row("plan", model.plan)
    console.print(head)
    console.print(_blocks(model))
    console.print(_stages(model))


def _blocks(model: ModelInfo) -> Table:
    table = Table(title="Blocks", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("list")
    table.add_column("blocks", justify="right")
    table.add_column("class")
    table.add_column("parameters", justify="right")
    for name, number, class_name, parameters in model.block_lists:
        table.add_row(name, str(number), class_name, count(parameters))
    return table


def _stages(model: ModelInfo) -> Table:
    table = Table(title="What each rank holds", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("rank", justify="right")
    table.add_column("blocks", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("weights", justify="right")
    table.add_column("components", overflow="fold")
    for stage in model.stages:
        cells = (stage.blocks, count(stage.parameters), size(stage.bytes), ", ".join(stage.components))
        table.add_row(str(stage.rank), *cells)
    return table
