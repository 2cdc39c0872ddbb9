"""The spread VAE equals the whole one: every class, uneven heights, up to four processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from patchpipe.distributed.process_groups import ProcessGroups
from patchpipe.distributed.rows import ROWS, WireRows
from patchpipe.errors import RankLost, UnsupportedModel
from patchpipe.vae import join_rows, spread_vae
from patchpipe.vae.convolution import RowKernel, spread_convolution
from patchpipe.vae.cut import cut_rows
from patchpipe.vae.hooks import Spread
from patchpipe.vae.norm import spread_group_norm
from tests.support.ranks import Place, run_ranks

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
WIDTH = 6  # of the latent: the cut is along the height


def kl(**changes: Any) -> nn.Module:
    return diffusers.AutoencoderKL(
        **{
            "block_out_channels": (8, 16, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "norm_num_groups": 4,
            "latent_channels": 4,
            **changes,
        }
    )


def tiny() -> nn.Module:
    channels, blocks = (8, 8, 8), (1, 1, 1)
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    )


def wan(**changes: Any) -> nn.Module:
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "num_res_blocks": 1}
    return diffusers.AutoencoderKLWan(**{**sizes, **changes})


def qwen() -> nn.Module:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 2], temperal_downsample=[False, True], num_res_blocks=1
    )


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "kl": kl,
    "kl without attention": partial(kl, mid_block_add_attention=False),
    "kl with attention everywhere": partial(
        kl, down_block_types=("AttnDownEncoderBlock2D",) * 3, up_block_types=("AttnUpDecoderBlock2D",) * 3
    ),
    "tiny": tiny,
    "wan": wan,
    "wan 2.2": partial(wan, is_residual=True, patch_size=2, in_channels=12, out_channels=12),
    "qwen": qwen,
}
FRAMES = {"wan": 3, "wan 2.2": 3, "qwen": 1}
FACTOR = {"wan 2.2": 8}


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """The VAE with all its parameters random, those of the norms too."""
    torch.manual_seed(0)
    vae = BUILDERS[name]().to(dtype).eval()
    for parameter in vae.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return vae


def latent_of(name: str, rows: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    """A random latent; the same on every rank."""
    time_dims = (FRAMES[name],) if name in FRAMES else ()
    return torch.randn(batch, 4, *time_dims, rows, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(rows))


def picture_of(name: str, rows: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    """A random picture of any height."""
    time_dims = (1 + 4 * (FRAMES[name] - 1),) if name in FRAMES else ()
    width = FACTOR.get(name, 4) * WIDTH
    noise = torch.Generator().manual_seed(rows)
    return torch.randn(batch, 3, *time_dims, rows, width, dtype=dtype, generator=noise)


def group_of(place: Place, **options: Any) -> WireRows:
    return join_rows(ProcessGroups(place.store, 60), place.rank, place.world_size, **options)


def error_of(found: Tensor, whole: Tensor) -> float:
    """Largest difference against the largest value."""
    assert found.shape == whole.shape
    assert found.dtype == whole.dtype
    return float((found - whole).abs().max() / whole.abs().max())


def encoded(vae: Any, picture: Tensor) -> Tensor:
    output = vae.encode(picture)
    return output.latents if hasattr(output, "latents") else output.latent_dist.parameters


@torch.no_grad()
def round_trip(place: Place, name: str, dtype: torch.dtype, latent_rows: list[int], picture_rows: list[int]) -> Any:
    """Largest errors of decode and encode on this rank, and whether the VAE came back as it was."""
    vae = build(name, dtype)
    latents = [latent_of(name, rows, dtype) for rows in latent_rows]
    pictures = [picture_of(name, rows, dtype) for rows in picture_rows]
    decoded = [vae.decode(latent).sample for latent in latents]
    moments = [encoded(vae, picture) for picture in pictures]
    before = [dict(module.__dict__) for module in vae.modules()]
    undo = spread_vae(vae, group_of(place))
    errors = []
    for latent, whole in zip(latents, decoded, strict=True):
        sample = vae.decode(latent).sample
        assert (sample is None) == (place.rank > 0)
        errors += [error_of(sample, whole)] if sample is not None else []
    errors += [error_of(encoded(vae, picture), whole) for picture, whole in zip(pictures, moments, strict=True)]
    undo()
    undo()
    same = [dict(module.__dict__).keys() for module in vae.modules()] == [attributes.keys() for attributes in before]
    back = torch.equal(vae.decode(latents[0]).sample, decoded[0]) and torch.equal(encoded(vae, pictures[0]), moments[0])
    return max(errors), same and back


@pytest.mark.some(of=11)
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", BUILDERS)
def test_spread_equals_whole_in_float64(name: str, ranks: int) -> None:
    heights = [ranks, 7, 9]  # one row each, and heights that divide by nothing
    unit = FACTOR.get(name, 4)
    odd = 0 if name == "wan 2.2" else 3  # that one refuses heights that are no multiple, whole or spread
    pictures = [unit * ranks, 5 * unit + odd]
    for error, back in run_ranks(ranks, round_trip, name, torch.float64, heights, pictures):
        assert error <= TOLERANCE[torch.float64]
        assert back


@pytest.mark.some(of=5)
@pytest.mark.parametrize("name", BUILDERS)
def test_spread_equals_whole_in_float32(name: str) -> None:
    for error, back in run_ranks(3, round_trip, name, torch.float32, [8], [40]):
        assert error <= TOLERANCE[torch.float32]
        assert back


@torch.no_grad()
def _options(place: Place) -> None:
    vae, latent = build("kl"), latent_of("kl", 11)
    whole, direct = vae.decode(latent).sample, vae.decoder(latent)
    group = group_of(place)
    undo = spread_vae(vae, group, gather_to=None, shares=(3, 1, 2))
    assert error_of(vae.decode(z=latent, return_dict=False)[0], whole) <= 1e-10
    assert torch.equal(vae.decoder(latent), direct)  # a part called directly computes the whole
    vae.enable_slicing()
    assert error_of(vae.decode(latent).sample, whole) <= 1e-10
    vae.disable_slicing()
    undo()
    undo = spread_vae(vae, group, gather_to=2)
    (sample,) = vae.decode(latent, return_dict=False)
    assert (sample is None) == (place.rank != 2)
    undo()
    channels_last = vae.to(memory_format=torch.channels_last)
    undo = spread_vae(channels_last, group, gather_to=None)
    assert error_of(vae.decode(latent.contiguous(memory_format=torch.channels_last)).sample, whole) <= 1e-10
    undo()
    vae.fuse_qkv_projections()
    undo = spread_vae(vae, group, gather_to=None)
    assert error_of(vae.decode(latent).sample, whole) <= 1e-10
    undo()


def test_options() -> None:
    run_ranks(3, _options)


class _Largest(TorchDispatchMode):
    """The most elements any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return output


@torch.no_grad()
def _largest(place: Place, name: str) -> tuple[int, int]:
    vae, latent = build(name, torch.float32), latent_of(name, 16, torch.float32, batch=1)
    with _Largest() as whole:
        vae.decode(latent)
    spread_vae(vae, group_of(place))
    with _Largest() as mine:
        vae.decode(latent)
    return mine.elements, whole.elements


@pytest.mark.parametrize("name", ["kl", "tiny", "wan"])
def test_no_rank_makes_a_tensor_larger_than_its_share(name: str) -> None:
    for mine, whole in run_ranks(4, _largest, name)[1:]:  # the first also holds the finished picture
        assert mine <= whole * 0.27  # rows that a caller pads come on top


KERNELS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 5, "padding": 2},
    {"kernel_size": 3, "padding": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 4, "padding": 1, "stride": 2},
    {"kernel_size": 5, "padding": 2, "stride": 3},
    {"kernel_size": 2, "padding": 0, "stride": 2},
    {"kernel_size": 2, "padding": 1, "stride": 2},
    {"kernel_size": (5, 1), "padding": (2, 0), "groups": 2},
    {"kernel_size": (1, 3), "padding": (0, 1)},
]


def _kernels(place: Place) -> list[float]:
    torch.manual_seed(1)
    spread = Spread(group_of(place))
    errors = []
    for options in KERNELS:
        for heights in ([4, 2, 7], [2, 2, 2], [5, 9, 3]):
            conv = nn.Conv2d(4, 6, **options).double()
            step = conv.stride[0]
            rows = [height * step for height in heights]
            rows[-1] += step - 1  # the last strip need not divide
            x = torch.randn(2, 4, sum(rows), 5, dtype=torch.float64)
            whole = conv(x)
            undo = spread_convolution(conv, spread)
            start = sum(rows[: place.rank])
            with spread.computing(), torch.no_grad():
                strip = conv(x.narrow(ROWS, start, rows[place.rank]))
            undo()
            first = start // step
            errors.append(float((strip - whole[:, :, first : first + strip.shape[ROWS]]).abs().max()))
            last = place.rank == place.world_size - 1
            assert strip.shape[ROWS] == (whole.shape[ROWS] - first if last else heights[place.rank])
    return errors


def test_any_convolution() -> None:
    for errors in run_ranks(3, _kernels):
        assert max(errors) < 1e-12


def _halo_bytes(place: Place) -> int:
    spread = Spread(group_of(place))
    conv = nn.Conv2d(4, 4, 5, padding=2)
    spread_convolution(conv, spread)
    with spread.computing(), torch.no_grad():
        conv(torch.ones(1, 4, 8, 10))
    return spread.group.sent_bytes  # type: ignore[attr-defined]


def test_sent_bytes_are_the_border_rows() -> None:
    border = 2 * 10 * 4 * 4  # rows × width × channels × bytes
    assert run_ranks(3, _halo_bytes) == [border, 2 * border, border]


def _norm_errors(place: Place) -> list[float]:
    """Large mean, small deviation: sums of squares would lose every digit."""
    torch.manual_seed(2)
    spread = Spread(group_of(place))
    errors = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = 1000 + torch.randn(2, 8, 9, 5, dtype=torch.float64) * (1 if dtype.itemsize > 2 else 100)
        x = x.to(dtype)
        norm = nn.GroupNorm(4, 8).double()
        norm.weight.data += torch.randn(8, dtype=torch.float64)
        truth = norm(x.double())
        norm.to(dtype)
        undo = spread_group_norm(norm, spread)
        start, stop = [(0, 2), (2, 8), (8, 9)][place.rank]
        with spread.computing(), torch.no_grad():
            strip = norm(x[:, :, start:stop])
        undo()
        assert strip.dtype == dtype
        errors.append(float((strip.double() - truth[:, :, start:stop]).abs().max()))
    return errors


def test_group_norm_is_accurate() -> None:
    for double, single, brain, half in run_ranks(3, _norm_errors):
        assert double < 1e-12
        assert single < 2e-3  # one unit in the last place of 1000 is 6e-5 deviations
        assert brain < 0.1
        assert half < 0.02


def _errors(place: Place) -> None:
    group = group_of(place)
    vae = build("kl")
    vae.enable_tiling()
    with pytest.raises(ValueError, match="disable_tiling"):
        spread_vae(vae, group)
    vae.disable_tiling()
    undo = spread_vae(vae, group)
    with pytest.raises(ValueError, match="already"):
        spread_vae(vae, group)
    vae.enable_tiling()
    with pytest.raises(ValueError, match="disable_tiling"):
        vae.decode(latent_of("kl", 6))
    vae.disable_tiling()
    with pytest.raises(ValueError, match="2 ranks need at least 2 latent rows"):
        vae.decode(latent_of("kl", 1))
    with pytest.raises(ValueError, match="2 ranks need at least 2 latent rows"):
        vae.encode(picture_of("kl", 7))
    with pytest.raises(TypeError, match="misses its tensor"):
        vae.decode()
    with pytest.raises(
        ValueError, match=r"rank 0 was given decode float64 \(2, 4, 5, 6\), but rank 1 decode .* 6, 6\)"
    ):
        vae.decode(latent_of("kl", 5 + place.rank))
    undo()
    with pytest.raises(ValueError, match="ranks disagree"):
        spread_vae(vae, group, gather_to=place.rank)
    assert "decode" not in vae.__dict__
    with pytest.raises(ValueError, match="gather_to=2"):
        spread_vae(vae, group, gather_to=2)
    with pytest.raises(ValueError, match="shares"):
        spread_vae(vae, group, shares=(1, 0))
    vae.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match="AttnProcessor2_0"):
        spread_vae(vae, group)
    assert all("_conv_forward" not in module.__dict__ for module in vae.modules())
    wan_residual = build("wan 2.2")
    undo = spread_vae(wan_residual, group)
    with pytest.raises(ValueError, match="multiples of 8"):
        wan_residual.encode(picture_of("wan 2.2", 20))
    undo()
    dropping = wan(dropout=0.1)
    with pytest.raises(ValueError, match=r"vae.eval\(\)"):
        spread_vae(dropping, group)


def test_errors() -> None:
    run_ranks(2, _errors)


def test_what_was_never_looked_at_is_refused() -> None:
    group = WireRows(_NoWire(), 0, 1)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match="AutoencoderDC cannot be spread"):
        spread_vae(type("AutoencoderDC", (nn.Module,), {})(), group)
    vae = kl()
    vae.decoder.conv_act = nn.Softmax(2)
    with pytest.raises(UnsupportedModel, match=r"decoder\.conv_act is a Softmax"):
        spread_vae(vae, group)
    smooth = diffusers.AutoencoderTiny(upsample_fn="bilinear")
    with pytest.raises(UnsupportedModel, match="'nearest-exact'"):
        spread_vae(smooth, group)
    with pytest.raises(ValueError, match="padding_mode"):
        RowKernel.of(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="must cover at least 2 rows"):
        RowKernel.of(nn.Conv2d(1, 1, 3))


def test_one_rank_needs_no_wire() -> None:
    vae, latent = build("kl"), latent_of("kl", 3)
    with torch.no_grad():
        whole = vae.decode(latent).sample
        undo = spread_vae(vae, WireRows(_NoWire(), 0, 1))  # type: ignore[arg-type]
        assert error_of(vae.decode(latent).sample, whole) <= 1e-12
    undo()


class _NoWire:
    def channel(self, peer: int) -> Any:
        raise AssertionError(f"nobody to talk to, yet rank {peer} was asked for")


def _abandoned(place: Place) -> float:
    group = join_rows(ProcessGroups(place.store, 2), place.rank, place.world_size)
    vae = build("kl")
    spread_vae(vae, group)
    if place.rank == 1:
        time.sleep(4)
        return 0.0
    started = time.monotonic()
    with pytest.raises(RankLost, match="rank 1"):
        vae.decode(latent_of("kl", 4))
    return time.monotonic() - started


def test_a_silent_rank_is_named_at_the_deadline() -> None:
    assert run_ranks(2, _abandoned)[0] < 4


@pytest.mark.parametrize("shares", [None, (1, 1, 1, 1), (5, 1, 1, 1), (1, 100, 1, 1), (0.1, 0.2, 0.3, 0.4)])
def test_cut_rows(shares: tuple[float, ...] | None) -> None:
    for units in range(8, 40):
        heights = cut_rows(units, 4, shares, minimum=2)
        assert sum(heights) == units
        assert min(heights) >= 2
        if shares is None:
            assert max(heights) - min(heights) <= 1
    with pytest.raises(ValueError, match="use at most 3 ranks"):
        cut_rows(7, 4, shares, minimum=2)
