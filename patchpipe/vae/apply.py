"""Spreads a VAE over ranks and takes it back, without touching its class."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from patchpipe.distributed.rows import ROWS, RowGroup
from patchpipe.vae.cut import check_shares, cut_rows
from patchpipe.vae.hooks import Spread, Undo, override
from patchpipe.vae.survey import Survey

MARK = "_patchpipe_rows"
ARGUMENTS = ("z", "x", "sample")


def spread_vae(
    vae: nn.Module, group: RowGroup, *, gather_to: int | None = 0, shares: Sequence[float] | None = None
) -> Undo:
    """Lets ``vae.decode`` and ``vae.encode`` compute one strip of rows per rank.

    Every rank calls this, and later ``decode`` and ``encode``, with the same whole tensors. The result is
    that of the whole computation up to the order of float sums; tiles that blend (``enable_tiling``) are not.
    Calling the VAE's parts directly (``vae.decoder``) computes the whole, as ever. Gradients do not flow.

    The cut into strips is that of the parallel VAE in xDiT (arXiv 2411.01738, section on the parallel VAE)
    and of DistVAE, its implementation.

    Args:
        vae: ``AutoencoderKL``, ``AutoencoderTiny``, ``AutoencoderKLWan`` or ``AutoencoderKLQwenImage``.
        group: The ranks, from the top of the picture to the bottom.
        gather_to: The rank whose ``decode`` returns the picture, of shape (batch, channels, [frames,] height,
            width); on the others ``sample`` is ``None``. ``None`` gathers on every rank. ``encode`` returns
            the whole latent (distribution) on every rank.
        shares: Relative heights of the strips, for ranks of uneven speed; ``None`` for even ones.

    Returns:
        What takes the VAE back; harmless when called twice.

    Raises:
        UnsupportedModel: The class is none of these, or holds a module that may mix rows some other way.
        ValueError: Tiling is on, the VAE is spread already, or the ranks were given different arguments.
    """
    if MARK in vae.__dict__:
        raise ValueError(f"{type(vae).__name__} is spread over ranks already: take it back first")
    check_shares(shares, group.size)
    if gather_to is not None and not 0 <= gather_to < group.size:
        raise ValueError(f"gather_to={gather_to} is none of the {group.size} ranks")
    survey = Survey(vae)
    _check_mode(vae)
    spread = Spread(group)
    strips = _Strips(vae, survey, spread, gather_to, shares)
    undo: list[Undo] = []

    def take_back() -> None:
        while undo:
            undo.pop()()

    try:
        for taking_off in survey.hooks(spread):  # one by one: a hook that raises leaves the ones before to undo
            undo.append(taking_off)
        undo += [override(vae, name, value) for name, value in strips.methods.items()]
        _agree(group, strips.description)
    except BaseException:
        take_back()
        raise
    return take_back


class _Strips:
    """``decode`` and ``encode`` of one spread VAE."""

    def __init__(
        self, vae: Any, survey: Survey, spread: Spread, gather_to: int | None, shares: Sequence[float] | None
    ) -> None:
        self.vae, self.group, self.spread = vae, spread.group, spread
        self.gather_to, self.shares = gather_to, shares
        self.factor, self.minimum, self.whole_factor = survey.factor, survey.minimum, survey.whole_factor
        self._decode, self._encode = vae.decode, vae.encode

    @property
    def methods(self) -> dict[str, Any]:
        """What the VAE's instance gets while it is spread."""
        return {"decode": self.decode, "encode": self.encode, MARK: self.spread}

    @property
    def description(self) -> str:
        """What must be the same on every rank."""
        config = sorted((name, str(value)) for name, value in dict(self.vae.config).items() if not name.startswith("_"))
        return f"gather_to={self.gather_to}, shares={self.shares} for {type(self.vae).__name__} {config}"

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """The VAE's own ``decode`` on this rank's latent rows, gathered."""

        def gather(rows: Tensor, sizes: Sequence[int]) -> Tensor | None:
            if self.gather_to is None:
                return self.group.all_gather(rows, sizes, ROWS)
            return self.group.gather(rows, sizes, ROWS, self.gather_to)

        return self._run("decode", self._decode, 1, gather, args, kwargs)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """The VAE's own ``encode`` on this rank's picture rows, gathered on every rank."""

        def gather(rows: Tensor, sizes: Sequence[int]) -> Tensor:
            return self.group.all_gather(rows, sizes, ROWS)

        return self._run("encode", self._encode, self.factor, gather, args, kwargs)

    def _run(
        self,
        name: str,
        compute: Callable[..., Any],
        unit: int,
        gather: Callable[[Tensor, Sequence[int]], Tensor | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        whole, args, kwargs = _first_tensor(name, args, kwargs)
        _check_mode(self.vae)
        _agree(self.group, f"{name} {str(whole.dtype)[6:]} {tuple(whole.shape)}")
        strip = self._own_rows(whole, unit)
        with torch.no_grad(), self.spread.computing():
            output = compute(strip, *args, **kwargs)
        return _regather(output, lambda rows: gather(rows, _all_sizes(self.group, rows.shape[ROWS])))

    def _own_rows(self, whole: Tensor, unit: int) -> Tensor:
        """This rank's strip; the last one takes the rows that fill no unit."""
        height = whole.shape[ROWS]
        if self.whole_factor and height % unit:
            raise ValueError(f"{type(self.vae).__name__} encodes heights that are multiples of {unit}, not {height}")
        heights = cut_rows(height // unit, self.group.size, self.shares, self.minimum)
        bounds = [0, *(rows * unit for rows in accumulate(heights))]
        bounds[-1] = height
        start, stop = bounds[self.group.rank], bounds[self.group.rank + 1]
        return whole.narrow(ROWS, start, stop - start)


def _first_tensor(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict]:
    if args:
        return args[0], args[1:], kwargs
    for argument in ARGUMENTS:
        if argument in kwargs:
            return kwargs[argument], (), {key: value for key, value in kwargs.items() if key != argument}
    raise TypeError(f"{name}() misses its tensor")


def _check_mode(vae: Any) -> None:
    if getattr(vae, "use_tiling", False):
        raise ValueError(
            f"{type(vae).__name__} has tiling on, which blends tiles: call vae.disable_tiling(); spread over ranks, "
            "each needs only its share of the memory anyway"
        )
    if any(isinstance(module, nn.Dropout) and module.p > 0 and module.training for module in vae.modules()):
        raise ValueError("dropout would differ from rank to rank: call vae.eval()")


def _agree(group: RowGroup, what: str) -> None:
    """Refuses to start a computation on which the ranks would wait for different messages."""
    mine = torch.tensor([zlib.crc32(what.encode())])
    if len(set(group.all_gather(mine, [1] * group.size, 0).tolist())) == 1:
        return
    text = torch.frombuffer(bytearray(what.encode()), dtype=torch.uint8)
    sizes = _all_sizes(group, text.numel())
    told = [bytes(part.tolist()).decode() for part in group.all_gather(text, sizes, 0).split(sizes)]
    other = next(rank for rank, words in enumerate(told) if words != told[0])
    raise ValueError(f"the VAE's ranks disagree: rank 0 was given {told[0]}, but rank {other} {told[other]}")


def _all_sizes(group: RowGroup, rows: int) -> list[int]:
    return [int(size) for size in group.all_gather(torch.tensor([rows]), [1] * group.size, 0)]


def _regather(output: Any, gather: Callable[[Tensor], Tensor | None]) -> Any:
    """The output with the whole picture or latent in place of the strip."""
    value = output[0]
    if isinstance(value, Tensor):
        whole: Any = gather(value)
    else:
        whole = type(value)(gather(value.parameters), deterministic=value.deterministic)
    if isinstance(output, tuple):
        return (whole, *output[1:])
    return type(output)(**{next(iter(output.keys())): whole})
