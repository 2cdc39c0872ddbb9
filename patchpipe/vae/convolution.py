"""Convolutions on a strip of rows: exact, with the neighbours' border rows fetched while the strip computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchpipe.distributed.rows import ROWS
from patchpipe.vae.hooks import Spread, Undo, override

Convolution: TypeAlias = nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class RowKernel:
    """A convolution as the height sees it.

    Output row ``j`` reads the input rows from ``j * stride - above`` on, ``extent`` of them (dilated taps
    included). Where every strip starts at a multiple of ``stride``, rank-independent borders follow: a strip
    lacks ``above`` rows at its upper end and ``extent - stride - above`` at its lower.

    Attributes:
        extent: Rows from the first tap to the last.
        stride: Input rows per output row.
        above: Zero rows over the picture, whoever adds them.
        below: Zero rows under the picture, likewise.
        given: How many of these are in the input already, because the caller pads before it convolves.
    """

    extent: int
    stride: int
    above: int
    below: int
    given: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, conv: Convolution, given: tuple[int, int] = (0, 0)) -> RowKernel:
        """The kernel of a module.

        Raises:
            ValueError: The convolution pads with something else than zeros, or makes the picture lower
                than its stride alone would.
        """
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(
                f"{conv} pads with padding_mode={conv.padding_mode!r}, padding={conv.padding!r}: a convolution on "
                "strips of rows needs padding_mode='zeros' and numbers for padding"
            )
        extent = conv.dilation[ROWS] * (conv.kernel_size[ROWS] - 1) + 1
        stride, padding = conv.stride[ROWS], conv.padding[ROWS]
        above, below = padding + given[0], padding + given[1]
        if above + below < extent - stride:
            raise ValueError(
                f"{conv} loses rows at the picture's border: on strips of rows its padding must cover at least "
                f"{extent - stride} rows, but covers {above + below}"
            )
        return cls(extent, stride, above, below, given)

    @property
    def halo(self) -> tuple[int, int]:
        """Rows a strip lacks from the neighbour above and from the one below."""
        return self.above, max(0, self.extent - self.stride - self.above)

    def inner(self, rows: int) -> tuple[int, int]:
        """The range of output rows that read nothing but the strip's own ``rows``; empty ones may be inverted."""
        return -(-self.above // self.stride), (rows + self.above - self.extent) // self.stride + 1


def spread_convolution(conv: Convolution, spread: Spread, given: tuple[int, int] = (0, 0)) -> Undo:
    """Lets a convolution compute the strip's rows of the whole picture's output.

    The strip is convolved as if the picture ended at its borders, while the neighbours' rows travel; then the
    few output rows that see a neighbour are computed again and put in place. That needs neither a copy of the
    strip with borders attached nor any wait that computing could have hidden.

    Args:
        conv: A two- or three-dimensional convolution of an unmodified module; inputs are of shape
            (batch, channels, [frames,] rows, width).
        spread: The ranks. Strips start at multiples of the stride.
        given: Zero rows above and below that the module's caller adds before the convolution.

    Returns:
        What takes the hook off.
    """
    kernel = RowKernel.of(conv, given)
    if kernel.halo == (0, 0) and kernel.below == 0 and not isinstance(conv, nn.Conv3d):
        return lambda: None
    whole = conv._conv_forward

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not spread.active:
            return whole(x, weight, bias)
        strip = x.narrow(ROWS, given[0], x.shape[ROWS] - sum(given))
        wanted = _wanted_rows(kernel, spread, strip.shape[ROWS])
        arriving = spread.group.exchange_halo(strip, *kernel.halo)
        first, last = kernel.inner(strip.shape[ROWS])
        if last < first:  # so low a strip that some output row sees both neighbours
            output = _bare(conv, _attach(kernel, strip, *arriving.take()), weight, bias)
        else:
            output = _convolve(conv, x, weight, bias, conv.padding)
            above, below = arriving.take()
            if above is not None:
                reach = strip.narrow(ROWS, 0, (first - 1) * kernel.stride - kernel.above + kernel.extent)
                _replace(output, 0, _bare(conv, torch.cat((above, reach), ROWS), weight, bias))
            if below is not None:
                start = last * kernel.stride - kernel.above
                reach = strip.narrow(ROWS, start, strip.shape[ROWS] - start)
                _replace(output, last, _bare(conv, torch.cat((reach, below), ROWS), weight, bias))
        return output if wanted is None else output.narrow(ROWS, 0, wanted)

    return override(conv, "_conv_forward", convolve)


def _wanted_rows(kernel: RowKernel, spread: Spread, rows: int) -> int | None:
    """Output rows of this strip; the last one takes all that the picture's end gives."""
    if spread.group.rank == spread.group.size - 1:
        return None
    if rows % kernel.stride:
        raise RuntimeError(
            f"a strip of {rows} rows met a stride of {kernel.stride}: strips must start at its multiples"
        )
    return rows // kernel.stride


def _attach(kernel: RowKernel, strip: Tensor, above: Tensor | None, below: Tensor | None) -> Tensor:
    """The strip between its neighbours' rows, or zeros where the picture ends."""
    at_top = above is None and kernel.halo[0] > 0
    upper = _zeros(strip, kernel.above) if at_top else above
    lower = _zeros(strip, kernel.below) if below is None else below
    return torch.cat([part for part in (upper, strip, lower) if part is not None], ROWS)


def _zeros(strip: Tensor, rows: int) -> Tensor:
    return strip.new_zeros((*strip.shape[:ROWS], rows, strip.shape[-1]))


def _replace(output: Tensor, start: int, rows: Tensor) -> None:
    output.narrow(ROWS, start, rows.shape[ROWS]).copy_(rows)


def _bare(conv: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution without any rows of padding; width and time are padded as ever."""
    padding = list(conv.padding)
    padding[ROWS] = 0
    return _convolve(conv, x, weight, bias, tuple(padding))


def _convolve(conv: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
    if isinstance(conv, nn.Conv2d):
        return F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # Left to itself, PyTorch unfolds videos of few rows into a matrix 27 times their size; whole ones it does not.
        return torch.mkldnn_convolution(x, weight, bias, padding, conv.stride, conv.dilation, conv.groups)
    return F.conv3d(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)
