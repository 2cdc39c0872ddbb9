"""Which modules of a VAE mix rows, and what each of them needs."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from torch import nn

from patchpipe.distributed.rows import ROWS
from patchpipe.errors import UnsupportedModel
from patchpipe.vae.attention import spread_attention
from patchpipe.vae.convolution import RowKernel, spread_convolution
from patchpipe.vae.hooks import Spread, Undo
from patchpipe.vae.norm import spread_group_norm

SUPPORTED = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderKLWan", "AutoencoderKLQwenImage")
# Compute each row from itself alone, or only call others. A module of a class that is in none of these lists
# may mix rows in a way nobody looked at, and would do it silently.
PER_POSITION = frozenset(
    """
    AutoencoderKL AutoencoderTiny AutoencoderKLWan AutoencoderKLQwenImage
    ModuleList Sequential Identity Dropout Linear SiLU ReLU GELU Mish FP32SiLU
    Encoder Decoder UNetMidBlock2D ResnetBlock2D Upsample2D Downsample2D
    DownEncoderBlock2D UpDecoderBlock2D AttnDownEncoderBlock2D AttnUpDecoderBlock2D
    EncoderTiny DecoderTiny AutoencoderTinyBlock
    WanEncoder3d WanDecoder3d WanMidBlock WanUpBlock WanResidualBlock WanResidualUpBlock WanResidualDownBlock
    WanResample WanRMS_norm AvgDown3D DupUp3D
    QwenImageEncoder3d QwenImageDecoder3d QwenImageMidBlock QwenImageUpBlock QwenImageResidualBlock
    QwenImageResample QwenImageRMS_norm
    """.split()  # noqa: SIM905 - a list of names reads best as words
)
CONVOLUTIONS = frozenset(("Conv2d", "Conv3d", "WanCausalConv3d", "QwenImageCausalConv3d"))
ATTENTIONS = frozenset(("Attention", "WanAttentionBlock", "QwenImageAttentionBlock"))


class Survey:
    """The modules of one VAE that mix rows.

    Args:
        vae: An unmodified diffusers module.

    Raises:
        UnsupportedModel: Its class, or that of a module within, was never looked at.
    """

    def __init__(self, vae: nn.Module) -> None:
        if type(vae).__name__ not in SUPPORTED:
            raise UnsupportedModel(f"{type(vae).__name__} cannot be spread over ranks; {', '.join(SUPPORTED)} can")
        self.vae = vae
        self.convolutions: list[tuple[Any, tuple[int, int]]] = []
        self.norms: list[nn.GroupNorm] = []
        self.attentions: list[nn.Module] = []
        given = dict(_padded_by_caller(vae))
        for name, module in vae.named_modules():
            self._sort(name, module, given.get(id(module), (0, 0)))

    def _sort(self, name: str, module: nn.Module, given: tuple[int, int]) -> None:
        kind = type(module).__name__
        if kind in CONVOLUTIONS:
            self.convolutions.append((module, given))
        elif kind == "GroupNorm":
            self.norms.append(module)
        elif kind in ATTENTIONS:
            self.attentions.append(module)
        elif isinstance(module, nn.Upsample):
            _check_upsample(name, module)
        elif kind != "ZeroPad2d" and kind not in PER_POSITION:
            raise UnsupportedModel(
                f"{name} is a {kind}, which may mix rows: {type(self.vae).__name__} cannot be spread"
            )

    @property
    def minimum(self) -> int:
        """Least latent rows of a strip: no convolution may look past the next rank."""
        return max((1, *(max(RowKernel.of(conv, given).halo) for conv, given in self.convolutions)))

    @property
    def factor(self) -> int:
        """Picture rows per latent row; strips of a picture start at its multiples."""
        encoder = {id(module) for module in self.vae.encoder.modules()}
        strides = [conv.stride[ROWS] for conv, _ in self.convolutions if id(conv) in encoder]
        return prod(strides) * (getattr(self.vae.config, "patch_size", None) or 1)

    @property
    def whole_factor(self) -> bool:
        """Whether the encoder refuses heights that are no multiple of the factor."""
        config = self.vae.config
        return bool(getattr(config, "is_residual", False)) or (getattr(config, "patch_size", None) or 1) > 1

    def hooks(self, spread: Spread) -> Iterator[Undo]:
        """Hooks every module that mixes rows, one by one; yields what takes each hook off."""
        for conv, given in self.convolutions:
            yield spread_convolution(conv, spread, given)
        for norm in self.norms:
            yield spread_group_norm(norm, spread)
        for block in self.attentions:
            yield spread_attention(block, spread)


def _padded_by_caller(vae: nn.Module) -> Iterator[tuple[int, tuple[int, int]]]:
    """Convolutions whose rows are padded before they are called: by whom does not show in the module itself."""
    for module in vae.modules():
        kind = type(module).__name__
        if kind in ("WanCausalConv3d", "QwenImageCausalConv3d"):
            yield id(module), (module._padding[2], module._padding[3])
        elif kind == "Downsample2D" and module.use_conv and module.padding == 0:
            yield id(module.conv), (0, 1)
        elif isinstance(module, nn.Sequential):
            for pad, conv in zip(module, list(module)[1:], strict=False):
                if isinstance(pad, nn.ZeroPad2d):
                    yield id(conv), (pad.padding[2], pad.padding[3])


def _check_upsample(name: str, module: nn.Upsample) -> None:
    scale = module.scale_factor
    factors = scale if isinstance(scale, tuple) else (scale,)
    if module.mode not in ("nearest", "nearest-exact") or any(not f or float(f) != int(f) for f in factors):
        raise UnsupportedModel(
            f"{name} upsamples with mode={module.mode!r}, scale_factor={scale}: strips of rows need 'nearest' or "
            "'nearest-exact' by a whole number"
        )
