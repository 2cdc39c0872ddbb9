"""``patchpipe explain``: what a layout means, before anything is started."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from patchpipe.cli import options
from patchpipe.cli.figures import size
from patchpipe.demo import MODEL_DIR
from patchpipe.loading.source import resolve_source

PIXELS_PER_TOKEN = 16  # eight of the autoencoder, two of the patch embedding

EPILOG = """
[bold]Examples[/]

  [green]patchpipe explain[/] --cfg 2 --pipefusion 2 --ulysses 2

  [green]patchpipe explain[/] ./flux-dev --pipefusion 4 --height 2048 --width 2048
"""

TextTokens = Annotated[int, typer.Option(help="Tokens of the prompt that take part in joint attention.")]


def explain(
    model: options.ModelArgument = None,
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
    patches: options.Patches = None,
    split_batch: options.SplitBatch = None,
    share_blocks: options.ShareBlocks = None,
    forecast: options.Forecast = None,
    offload: options.Offload = None,
    warmup: options.Warmup = None,
    height: options.Height = 1024,
    width: options.Width = 1024,
    text_tokens: TextTokens = 512,
    output_rank: options.OutputRank = 0,
    text_rank: options.TextRank = None,
    _debug: options.Debug = False,
) -> None:
    """Show the mesh of a layout: who is where, who holds what, and what travels in a step."""
    given = locals()
    config = options.read_config(given)
    source = resolve_source(model or MODEL_DIR, revision=revision)
    revision = revision if source.folder is None else None
    from patchpipe.layout.volume import kept, traffic
    from patchpipe.layout.words import communicators, ranks_table
    from patchpipe.planner.work.describe import volume_of  # heavy, and not needed to refuse bad input

    tokens = (height or 1024) // PIXELS_PER_TOKEN * ((width or 1024) // PIXELS_PER_TOKEN)
    console = Console(highlight=False)
    console.print(f"[bold]{config.describe()}[/] · {config.world_size} ranks")
    header, *rows = ranks_table(config.mesh_shape, [config.holdings(rank) for rank in range(config.world_size)])
    table = Table(*header, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    volume = volume_of(source.path, config, tokens, text_tokens, revision)
    sent = traffic(config.mesh_shape, volume, config.ulysses_inner, config.changed_tokens or 1.0)
    title = f"A rank sends per step, {height}×{width} pixels, one branch"
    console.print(title if sent else "One device: nothing travels.")
    for method, sent_bytes in sent.items():
        console.print(f"  {method:14}{size(int(sent_bytes))}")
    if config.stale:
        held = kept(config.mesh_shape, volume, forecasts=config.forecasts)
        console.print(f"and holds {size(int(held))} of keys and values")
    for line in communicators(config.mesh_shape, config.ulysses_inner):
        console.print(line)
