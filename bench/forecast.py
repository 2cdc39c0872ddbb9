"""What a forecast of stale keys and values costs at the sizes of real blocks, on this machine.

python -m bench.forecast
python -m bench.forecast --patches 4 --repeats 9

One layer's store takes a patch's rows as it does in a steady step, with a forecast and without, in turns: the first
patch, which moves all other rows on, and the others. Beside it one block of the model computes a
patch: its matrix products, and attention to all rows. Seconds are those of the thread's own processor time, which other
programs on the machine disturb less than the clock on the wall.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import thread_time
from typing import Annotated, Any

import torch
import typer
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from bench.rounds import save
from patchpipe import ParallelConfig
from patchpipe.models.latent import Raster
from patchpipe.stage.keys.forecast import Clock, Pace
from patchpipe.stage.keys.store import LayerStore
from patchpipe.stage.patches import Cut, Patch
from patchpipe.stage.rows import Rows

COMMAND = "python -m bench.forecast"


@dataclass(frozen=True)
class Size:
    """A block of a model and the rows it sees.

    Attributes:
        heads: Attention heads of 128 channels.
        text: Text rows.
        side: Rows of tokens of the picture, and tokens in a row.
    """

    heads: int
    text: int
    side: int

    @property
    def rows(self) -> Rows:
        """The layer's sequence."""
        return Rows(("text", "image"), (self.text, self.side**2), Raster(self.side, self.side, self.side))


FLUX = Size(heads=24, text=512, side=64)  # 1024 px


class Layer:
    """One layer's store in a request under way, and what its patches bring.

    Args:
        size: The layer.
        patches: Patches of the latent.
        dtype: Of keys and values.
        forecast: Whether stale rows are forecast.
        device: Where they lie.
    """

    def __init__(
        self,
        size: Size,
        patches: int,
        dtype: torch.dtype,
        *,
        forecast: bool,
        device: torch.device | None = None,
    ) -> None:
        self.store, self.clock, self.forecast, self.calls = LayerStore(size.rows), Clock(), forecast, 0
        self.cut = Cut.of(size.rows.raster, ParallelConfig(patches=patches), size.text)
        whole = torch.randn(2, 1, size.heads, size.rows.total, 128, dtype=dtype, device=device)
        self._time = torch.tensor([1000.0], device=device)
        self.fresh = {patch.index: self._part(patch, whole) for patch in self.cut.patches}
        self.store.keep(*whole, pace=self._pace())
        for _ in range(2):
            self.step()

    def _part(self, patch: Patch, whole: torch.Tensor) -> torch.Tensor:
        return whole[..., : self.store.rows.count(patch), :].clone()

    def _pace(self) -> Pace | None:
        self.calls += 1
        pace = self.clock.tick(self._time - self.calls)
        return pace if self.forecast else None

    def step(self) -> dict[str, float]:
        """Processor seconds of the first patch and of the others, in one step."""
        pace, spent = self._pace(), []
        for patch in self.cut.patches:
            rows = self.fresh[patch.index]
            spent.append(seconds_of(lambda patch=patch, rows=rows: self.store.write(patch, *rows, pace=pace)))
        return {"first": spent[0], "others": median(spent[1:]), "step": sum(spent)}


def seconds_of(run: Callable[[], Any]) -> float:
    """Processor seconds of this thread."""
    began = thread_time()
    run()
    return thread_time() - began


def block_seconds(size: Size, patches: int, dtype: torch.dtype) -> Callable[[], float]:
    """Measures one block's work on a patch: what it does with the patch's rows, and attention to all other rows."""
    width, rows = size.heads * 128, size.rows.total // patches
    block = FluxSingleTransformerBlock(width, size.heads, 128).to(dtype)
    hidden, text, temb = torch.randn(1, rows - 8, width), torch.randn(1, 8, width), torch.randn(1, width)
    query = torch.randn(1, size.heads, rows, 128, dtype=dtype)
    others = torch.randn(2, 1, size.heads, size.rows.total - rows, 128, dtype=dtype)

    def run() -> None:
        block(hidden.to(dtype), text.to(dtype), temb.to(dtype))
        scaled_dot_product_attention(query, *others)

    return lambda: seconds_of(run)


def main(
    patches: Annotated[int, typer.Option(help="Patches of the latent.")] = 8,
    repeats: Annotated[int, typer.Option(help="Measured steps of each, in turns.")] = 5,
) -> None:
    """Measures, prints a table and writes bench/results."""
    torch.set_num_threads(1)
    table, rows = Table("dtype", "a block's patch", "added: first patch", "others", "of a step"), []
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            layers = [Layer(FLUX, patches, dtype, forecast=forecast) for forecast in (False, True)]
            work, found, block = block_seconds(FLUX, patches, dtype), list[list[dict[str, float]]](), list[float]()
            for _ in range(repeats):
                found.append([layer.step() for layer in layers])
                block.append(work())
            added = {name: median(with_[name] - without[name] for without, with_ in found) for name in found[0][0]}
            row = {"dtype": str(dtype).removeprefix("torch."), "block": median(block), **added}
            row["share"] = row["step"] / (patches * row["block"])
            rows.append(row)
            cells = [f"{1000 * row[name]:.1f} ms" for name in ("block", "first", "others")]
            table.add_row(row["dtype"], *cells, f"{row['share']:+.1%}")
    Console().print(table)
    command = f"{COMMAND} --patches {patches} --repeats {repeats}"
    save("forecast-cpu", command, {"patches": patches, "forecast_cpu": rows})


if __name__ == "__main__":
    typer.run(main)
