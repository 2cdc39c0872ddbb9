"""Cards as data: what each can do, what usually joins several of them, and where the figures are from."""

from __future__ import annotations

import re
from dataclasses import dataclass

from patchpipe.errors import did_you_mean
from patchpipe.planner.machine.devices import GB, GIB, HOST, UPLOAD, Device

TILE = 128 * 128  # output elements one multiprocessor works on at a time in the usual matrix kernels
TAIL = 0.15  # of a wave of tiles idle at the end of a kernel: FLUX.1 in 8 stages of 8 patches on L40, arXiv 2411.01738
LAUNCH = 4e-6  # seconds from one kernel to the next in eager PyTorch on a current host
# What a card's slot makes of copies from pinned memory, by the link that usually joins such cards.
UPLOADS = {
    "pcie3": UPLOAD / 2,
    "nvlink2": UPLOAD / 2,
    "pcie5": 2 * UPLOAD,
    "nvlink4": 2 * UPLOAD,
    "nvlink5": 2 * UPLOAD,
}


@dataclass(frozen=True)
class Card:
    """A card that can be bought or rented.

    Attributes:
        device: What it can do.
        link: What usually joins several of them in a host, by the name of a link.
        aliases: Other names, without spaces and dashes.
    """

    device: Device
    link: str
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All its names, as ``_bare`` writes them."""
        return _bare(self.device.name), *self.aliases


def _card(
    name: str,
    teraflops: float,
    efficiency: float,
    gib: int,
    gigabytes: float,
    multiprocessors: int,
    link: str,
    source: str,
    aliases: tuple[str, ...] = (),
) -> Card:
    fill = TAIL * multiprocessors * TILE
    figures = (teraflops * 1e12, efficiency, gib * GIB, gigabytes * GB, fill, LAUNCH, source, HOST)
    upload = UPLOADS.get(link, UPLOAD)
    return Card(Device(name, *figures, upload), link, aliases)


# Peak: dense 16-bit products with float32 sums, without the sparsity that data sheets like to double it by. Efficiency:
# operations of a diffusion model over the published time of one card where there is one; cards of the same chip and the
# like power limit are put beside it. Float32 sums at half rate, as on GeForce cards, are easily reached.
_ADA_PUBLISHED = "NVIDIA data sheet; efficiency from FLUX.1, PixArt and SD3 on one L40 in xDiT's documentation"
_ADA_LIKE = "NVIDIA data sheet; efficiency as of the L40, less for the same power spread over a higher peak"
_ADA = "NVIDIA Ada architecture paper (sums at half rate)"
_AMPERE = "NVIDIA Ampere GA102 architecture paper"
_BLACKWELL_RTX = "NVIDIA RTX Blackwell architecture paper (sums at half rate)"
_BLACKWELL = "NVIDIA Blackwell architecture brief; efficiency as of the H100"
_CDNA = "AMD data sheet; efficiency of large products under hipBLASLt"

CARDS: tuple[Card, ...] = (
    # Data centres
    _card("gb200", 2500, 0.50, 186, 8000, 148, "nvlink5", _BLACKWELL),
    _card("b200", 2250, 0.50, 180, 8000, 148, "nvlink5", _BLACKWELL),
    _card("h200", 989, 0.50, 141, 4800, 132, "nvlink4", "NVIDIA data sheet; efficiency as of the H100, the same chip"),
    _card(
        "h100", 989, 0.50, 80, 3350, 132, "nvlink4",
        "NVIDIA data sheet (SXM); efficiency of FlashAttention-2 and cuBLAS", ("h100sxm", "h100sxm5"),
    ),
    _card("h100-nvl", 835, 0.50, 94, 3900, 132, "pcie5", "NVIDIA data sheet; efficiency as of the H100"),
    _card("h100-pcie", 756, 0.50, 80, 2000, 114, "pcie5", "NVIDIA data sheet; efficiency as of the H100"),
    _card("gh200", 989, 0.50, 96, 4000, 132, "nvlink4", "NVIDIA data sheet; efficiency as of the H100, the same chip"),
    _card(
        "h20", 148, 0.85, 96, 4000, 78, "nvlink4",
        "NVIDIA data sheet; efficiency as of cards with little peak for their memory",
    ),
    _card(
        "a100", 312, 0.65, 80, 2039, 108, "nvlink3",
        "NVIDIA data sheet (80 GB, SXM); efficiency as of large GEMMs and flash", ("a100sxm", "a10080gb", "a10080"),
    ),
    _card(
        "a100-40gb", 312, 0.65, 40, 1555, 108, "nvlink3",
        "NVIDIA data sheet (40 GB, SXM); efficiency as of the 80 GB card", ("a10040", "a10040gbsxm"),
    ),
    _card(
        "a100-pcie", 312, 0.60, 80, 1935, 108, "pcie4",
        "NVIDIA data sheet (80 GB, PCIe, 300 W); efficiency as of the SXM card, less for the power", ("a10080gbpcie",),
    ),
    _card("l40", 181, 0.66, 48, 864, 142, "pcie4", _ADA_PUBLISHED),
    _card("l40s", 362, 0.40, 48, 864, 142, "pcie4", _ADA_LIKE),
    _card(
        "l20", 119.5, 0.86, 48, 864, 92, "pcie4",
        "NVIDIA data sheet; efficiency from HunyuanVideo in xDiT's documentation",
    ),
    _card("l4", 121, 0.45, 24, 300, 58, "pcie4", _ADA_LIKE),
    _card("a40", 149.7, 0.60, 48, 696, 84, "pcie4", "NVIDIA data sheet; efficiency as of the RTX A6000, same chip"),
    _card("a10", 125, 0.50, 24, 600, 72, "pcie4", "NVIDIA data sheet; efficiency less than the A40's for 150 W"),
    _card("a10g", 70, 0.80, 24, 600, 80, "pcie4", "NVIDIA data sheet of the A10G (AWS g5); sums at half rate"),
    _card("v100", 125, 0.60, 32, 900, 80, "nvlink2", "NVIDIA data sheet (SXM2, 32 GB); float16, it has no bfloat16"),
    _card("t4", 65, 0.40, 16, 320, 40, "pcie3", "NVIDIA data sheet; float16, it has no bfloat16; 70 W"),
    _card("mi325x", 1307, 0.45, 256, 6000, 304, "xgmi3", _CDNA),
    _card("mi300x", 1307, 0.45, 192, 5300, 304, "xgmi3", _CDNA),
    _card(
        "mi250", 181, 0.60, 64, 1638, 104, "xgmi2",
        f"{_CDNA}; one of its two dies, each of which is a device", ("mi250x", "mi210"),
    ),
    # Workstations
    _card(
        "rtx-pro-6000", 503.8, 0.45, 96, 1792, 188, "pcie5",
        "NVIDIA RTX PRO Blackwell architecture paper; efficiency as of the L40S, more for 600 W",
        ("rtxpro6000blackwell", "pro6000", "6000pro", "6000blackwell", "rtx6000pro", "rtx6000blackwell"),
    ),
    _card("rtx-6000-ada", 364.2, 0.40, 48, 960, 142, "pcie4", _ADA_LIKE, ("6000ada",)),
    _card("rtx-a6000", 154.8, 0.60, 48, 768, 84, "pcie4", f"NVIDIA data sheet and {_AMPERE.removeprefix('NVIDIA ')}"),
    _card("rtx-a5000", 111.1, 0.60, 24, 768, 64, "pcie4", f"NVIDIA data sheet and {_AMPERE.removeprefix('NVIDIA ')}"),
    # Desktops
    _card("rtx5090", 209.5, 0.85, 32, 1792, 170, "pcie5", _BLACKWELL_RTX),
    _card("rtx5080", 112.6, 0.85, 16, 960, 84, "pcie5", _BLACKWELL_RTX),
    _card("rtx5070ti", 87.9, 0.85, 16, 896, 70, "pcie5", _BLACKWELL_RTX),
    _card("rtx5070", 61.7, 0.85, 12, 672, 48, "pcie5", _BLACKWELL_RTX),
    _card("rtx4090", 165, 0.85, 24, 1008, 128, "pcie4", _ADA),
    _card("rtx4080", 97.5, 0.85, 16, 717, 76, "pcie4", _ADA, ("rtx4080super",)),
    _card("rtx4070ti", 80.2, 0.85, 12, 504, 60, "pcie4", _ADA),
    _card("rtx4070tisuper", 88.2, 0.85, 16, 672, 66, "pcie4", _ADA),
    _card("rtx4070", 58.3, 0.85, 12, 504, 46, "pcie4", _ADA, ("rtx4070super",)),
    _card("rtx4060ti", 44.1, 0.85, 16, 288, 34, "pcie4", _ADA),
    _card("rtx3090", 71, 0.85, 24, 936, 82, "pcie4", f"{_AMPERE} (sums at half rate)"),
    _card("rtx3090ti", 80, 0.85, 24, 1008, 84, "pcie4", f"{_AMPERE} (sums at half rate)"),
    _card("rtx3080", 59.5, 0.85, 10, 760, 68, "pcie4", f"{_AMPERE} (sums at half rate)"),
    _card("rtx3060", 25.5, 0.85, 12, 360, 28, "pcie4", f"{_AMPERE} (sums at half rate)"),
)  # fmt: skip
DEVICES: tuple[Device, ...] = tuple(card.device for card in CARDS)

_NOISE = re.compile(
    r"\b(nvidia|amd|geforce|instinct|tesla|quadro|gpu|generation|oam|hbm\w*|workstation|server|edition|max-q)\b"
)
_MEMORY = re.compile(r"\d+ ?gb")


def _bare(name: str) -> str:
    """A name without case, spaces, dashes and a driver's words: ``NVIDIA GeForce RTX 4090`` is ``rtx4090``."""
    return re.sub(r"[^a-z0-9]", "", _NOISE.sub("", name.lower().replace("_", " ")))


def card_found(name: str) -> Card | None:
    """A card by the name that a person or a driver gives it; ``None`` where it is unknown."""
    tried = [name, re.sub(r"sxm\d?", "sxm", name.lower())]
    tried += [re.sub(r"sxm", "", tried[-1])]
    tried += [_MEMORY.sub("", one) for one in tried]
    for given in dict.fromkeys(map(_bare, tried)):
        for card in CARDS:
            if given and (given in card.names or f"rtx{given}" in card.names):
                return card
    return None


def card_named(name: str) -> Card:
    """A card by its name, in any case and spelling: ``4090``, ``rtx 4090`` and ``RTX4090`` are one.

    Raises:
        ValueError: It is unknown; names the nearest, or lists those known.
    """
    found = card_found(name)
    if found is not None:
        return found
    names = [one for card in CARDS for one in card.names]
    near = did_you_mean(_bare(name), names) or did_you_mean(f"rtx{_bare(name)}", names)
    meant = next((card.device.name for card in CARDS if near in card.names), None)
    known = f"did you mean {meant}?" if meant else f"use {', '.join(card.device.name for card in CARDS)}."
    raise ValueError(f"device {name!r} is unknown: {known} Or measure your own with `patchpipe profile`")


def device_named(name: str) -> Device:
    """What a card can do; see ``card_named``."""
    return card_named(name).device
