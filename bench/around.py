"""What surrounds the blocks, beside the blocks: counted for real sizes, with no weights and no device.

python -m bench.around
python -m bench.around --patches 8 --card H100
python -m bench.around --forecast

The root ``forward`` of a model sees whole shapes, patch after patch: it embeds the whole latent, and the patch's rows
are cut out of that. Every operation of one patch's way through a stage is counted, its products and the bytes it reads
and writes; its seconds are the longer of the two on a card. The table tells how much of it is not the blocks' work;
with ``--forecast``, how much longer a patch takes where stale keys and values are forecast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import diffusers
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.rounds import save
from patchpipe import ParallelConfig
from patchpipe.layout.split import StageBlocks, stages_of
from patchpipe.models import plan_for
from patchpipe.models.latent import Raster
from patchpipe.planner.machine.cards import card_named
from patchpipe.planner.machine.devices import Device
from patchpipe.stage.context import CallContext
from patchpipe.stage.keys.forecast import Clock
from patchpipe.stage.patches import Cut
from patchpipe.stage.seam import Seam
from patchpipe.stage.stage import Stage

COMMAND = "python -m bench.around"
DTYPE = torch.bfloat16
ITEM = DTYPE.itemsize
MOVING_NOTHING = ("prim::device", "aten::_unsafe_view", "aten::empty", "aten::detach")
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """A model of real size and one call of it.

    Attributes:
        kind: Its class, whose default configuration is meant.
        raster: How the latent divides.
        inputs: Makes the arguments of a call.
        changes: To the default configuration.
    """

    kind: str
    raster: Raster
    inputs: Callable[[], Inputs]
    changes: Mapping[str, Any]

    def build(self) -> Any:
        """The model, without memory where none is asked for."""
        kept = torch.get_default_dtype()
        torch.set_default_dtype(DTYPE)
        try:
            return getattr(diffusers, self.kind)(**self.changes)
        finally:
            torch.set_default_dtype(kept)


def _filled(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def _flux() -> Inputs:
    ids = {"img_ids": _filled(4096, 3, dtype=torch.float32), "txt_ids": _filled(512, 3, dtype=torch.float32)}
    text = {"encoder_hidden_states": _filled(1, 512, 4096), "pooled_projections": _filled(1, 768)}
    return {"hidden_states": _filled(1, 4096, 64), **text, **ids, "timestep": _filled(1), "guidance": _filled(1)}


def _sd3() -> Inputs:
    text = {"encoder_hidden_states": _filled(2, 333, 4096), "pooled_projections": _filled(2, 2048)}
    return {"hidden_states": _filled(2, 16, 128, 128), **text, "timestep": _filled(2)}


def _pixart() -> Inputs:
    text, none = {"encoder_hidden_states": _filled(2, 300, 4096)}, {"resolution": None, "aspect_ratio": None}
    return {"hidden_states": _filled(2, 4, 128, 128), **text, "timestep": _filled(2), "added_cond_kwargs": none}


def _wan() -> Inputs:
    text = {"encoder_hidden_states": _filled(1, 512, 4096)}
    return {"hidden_states": _filled(1, 16, 21, 60, 104), **text, "timestep": _filled(1)}


SIZES: dict[str, Size] = {
    "FLUX.1 dev, 1024 px": Size("FluxTransformer2DModel", Raster(64, 64, 64), _flux, {"guidance_embeds": True}),
    "SD3 medium, 1024 px": Size(
        "SD3Transformer2DModel", Raster(64, 64, 2), _sd3,
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    ),
    "PixArt, 1024 px": Size(
        "PixArtTransformer2DModel", Raster(64, 64, 2), _pixart,
        {"caption_channels": 4096, "use_additional_conditions": False},
    ),
    "Wan 2.1 14B, 480p": Size("WanTransformer3DModel", Raster(21, 30 * 52, 1), _wan, {}),
}  # fmt: skip


@dataclass
class Work:
    """What was counted.

    Attributes:
        flops: Operations of matrix products and attention.
        bytes: What all operations read and write.
        seconds: By the longer of the two of each operation.
    """

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0


class Counter(TorchDispatchMode):
    """Counts operations, those of blocks apart from those around them.

    Args:
        device: What they are to run on.
    """

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device, self.within, self.kept = device, False, 0
        self.blocks, self.around = Work(), Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view and func._schema.name not in MOVING_NOTHING:
            self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        work = self.blocks if self.within else self.around
        counted = flop_registry.get(func._overloadpacket)
        flops = counted(*args, **kwargs, out_val=result) if counted is not None else 0
        moved = sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))
        work.flops += flops
        work.bytes += moved
        work.seconds += max(flops / self.device.rate, moved / self.device.bandwidth)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What runs in the block is a block's work."""
        self.within = True
        try:
            yield
        finally:
            self.within = False


def count(
    size: Size, owned: StageBlocks, at: tuple[int, int], patches: int, device: Device, forecast: bool = False
) -> Counter:
    """Counts the second patch of a steady step on one stage.

    Args:
        size: The model and its call.
        owned: The stage's blocks.
        at: Which stage it is, of how many.
        patches: Patches of the latent.
        device: What is to compute.
        forecast: Whether stale keys and values are forecast.
    """
    with FakeTensorMode(), torch.no_grad():
        model = size.build()
        plan, inputs = plan_for(model), size.inputs()
        stage = Stage(model, plan, owned, first=at[0] == 0, last=at[0] == at[1] - 1)
        stage.attach()
        stage.sew()
        kept: dict[tuple[Any, ...], Any] = {}
        shapes = stage.look(inputs, size.raster, kept)
        cut = Cut.of(size.raster, ParallelConfig(patches=patches), shapes.riders)
        counter, memo, stores, clock = Counter(device), dict[str, Any](), dict[str, Any](), Clock()
        first, patch = cut.patches[:2]
        for piece in (cut.whole, first, patch):  # what is computed once for all patches is there by the third
            pace = clock.tick(inputs[plan.time]) if forecast else None
            context = CallContext(piece, shapes, stores, memo=memo, request_memo=kept, pace=pace)
            if not stage.first:
                hop = shapes.hop(stage.blocks[0].listing, inputs[plan.latent].shape[0], piece)
                context.received = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in hop.items()}
            units = piece.units
            latent = inputs[plan.latent].narrow(plan.grid.dim, units[0], units[1] - units[0]) if stage.first else None
            if piece is not patch:
                stage.run(inputs, latent, context)
                continue
            for place in stage.blocks:
                _counted(place.block.__dict__["forward"], counter)
            with counter:
                stage.run(inputs, latent, context)
        counter.kept = sum(store.bytes for store in stores.values())
        stage.detach()
    return counter


def _counted(seam: Seam, counter: Counter) -> None:
    compute = seam.compute

    def counted(*args: Any, **kwargs: Any) -> Any:
        with counter.inside():
            return compute(*args, **kwargs)

    seam.compute = counted


def even(size: Size, stages: int) -> list[StageBlocks]:
    """As many blocks for every stage as for the others, or one more."""
    with FakeTensorMode():
        model = size.build()
        blocks = len(plan_for(model).blocks_of(model))
    return stages_of(tuple(blocks * (at + 1) // stages - blocks * at // stages for at in range(stages)))


def forecast_row(title: str, stages: int, patches: int, device: Device) -> dict[str, Any]:
    """How much a forecast adds to a patch on a stage in the middle: in torch's operations, and fused."""
    size, at = SIZES[title], stages // 2
    owned = even(size, stages)[at]
    without, ahead = (count(size, owned, (at, stages), patches, device, forecast) for forecast in (False, True))
    moved, seconds = (
        [getattr(found.blocks, name) + getattr(found.around, name) for found in (without, ahead)]
        for name in ("bytes", "seconds")
    )
    fused = fused_bytes(without.kept // ITEM, patches)
    return {
        "model": title,
        "bytes": moved[1] / moved[0] - 1,
        "seconds": seconds[1] / seconds[0] - 1,
        "fused_bytes": fused / moved[0],
        "fused_seconds": fused / device.bandwidth / seconds[0],
    }


def fused_bytes(numbers: int, patches: int) -> float:
    """What fused passes move for a patch, on the mean of a step, beside the copy that there is without a forecast.

    A fresh row: the last one is read, and its change read and written in eight bits. All rows but the first patch's,
    once a step: the row is read and written, its change read.

    Args:
        numbers: Of the keys and values of all rows.
        patches: Patches of the latent.
    """
    return numbers * (ITEM + 2 + (2 * ITEM + 1) * (patches - 1) / patches) / patches


def row(title: str, stage: int, stages: int, patches: int, device: Device) -> dict[str, Any]:
    """The figures of one stage."""
    size = SIZES[title]
    found = count(size, even(size, stages)[stage], (stage, stages), patches, device)
    own, around = found.blocks, found.around
    return {
        "model": title,
        "stage": stage,
        "gigaflops": own.flops / 1e9,
        "flops": around.flops / (own.flops + around.flops),
        "bytes": around.bytes / (own.bytes + around.bytes),
        "seconds": around.seconds / (own.seconds + around.seconds),
    }


def main(
    patches: Annotated[int, typer.Option(help="Patches of the latent.")] = 4,
    stages: Annotated[int, typer.Option(help="Stages of the pipeline.")] = 4,
    card: Annotated[str, typer.Option(help="The card whose seconds are worked out.")] = "H100",
    forecast: Annotated[bool, typer.Option("--forecast", help="Count what a forecast adds, in place of that.")] = False,
) -> None:
    """Counts, prints a table and writes bench/results."""
    device = card_named(card).device
    command = f"{COMMAND} --patches {patches} --stages {stages} --card {card}"
    if forecast:
        added = [forecast_row(title, stages, patches, device) for title in track(SIZES, "counting", transient=True)]
        Console().print(
            *(f"{one['model']}: {one['bytes']:+.0%} bytes, {one['seconds']:+.1%} seconds" for one in added), sep="\n"
        )
        save("forecast", f"{command} --forecast", {"card": device.name, "forecast": added})
        return
    cases = [(title, stage) for title in SIZES for stage in sorted({0, stages // 2, stages - 1})]
    rows = [row(title, stage, stages, patches, device) for title, stage in track(cases, "counting", transient=True)]
    table = Table("model", "stage", "GFLOP of blocks", "around: FLOPs", "bytes", "seconds", title=f"{patches} patches")
    for one in rows:
        shares = [f"{one[name]:.2%}" for name in ("flops", "bytes", "seconds")]
        table.add_row(one["model"], f"{one['stage']} of {stages}", f"{one['gigaflops']:.0f}", *shares)
    Console().print(table)
    figures = {"card": device.name, "stages": stages, "around": rows}
    save("around", command, figures)


if __name__ == "__main__":
    typer.run(main)
