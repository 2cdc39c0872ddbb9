"""Cards as data: what a device can do, and where each figure is from."""

from __future__ import annotations

from dataclasses import dataclass

TILE = 128 * 128  # output elements one multiprocessor works on at a time in the usual matrix kernels
TAIL = 0.15  # of a wave of tiles idle at the end of a kernel: FLUX.1 in 8 stages of 8 patches on L40, arXiv 2411.01738
LAUNCH = 4e-6  # seconds from one kernel to the next in eager PyTorch on a current host
# Seconds the host takes to start a kernel of an eager block, the Python of its modules included. No run on slower cards
# contradicts it (PixArt in 8 stages on L40 leaves 18 µs); FLUX.1 on 4 H100, which waits for its host, takes twice that.
HOST = 15e-6
GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What the cost model knows of one device.

    Attributes:
        name: Its name.
        flops: Peak operations a second, dense bfloat16 with float32 sums.
        efficiency: Share of the peak that large matrix products and attention reach in diffusion transformers.
        memory: Bytes of memory.
        bandwidth: Bytes a second of its memory.
        fill: Output elements' worth of time that a matrix product loses, whatever its size, because its last tiles
            leave part of the device idle.
        launch: Seconds every operation costs beside its work.
        source: Where the figures are from.
        host: Seconds its host takes to start an operation of an eager block, while the device does what was started
            before; 0 where host and device are one.
    """

    name: str
    flops: float
    efficiency: float
    memory: int
    bandwidth: float
    fill: float
    launch: float
    source: str
    host: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flops", "efficiency", "memory", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} of device {self.name} must be above 0")
        for name in ("fill", "launch", "host"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} of device {self.name} must be 0 or more")

    @property
    def rate(self) -> float:
        """Operations a second that large products really get."""
        return self.flops * self.efficiency


def _card(
    name: str, teraflops: float, efficiency: float, gib: int, gigabytes: float, multiprocessors: int, source: str
) -> Device:
    fill = TAIL * multiprocessors * TILE
    return Device(name, teraflops * 1e12, efficiency, gib * GIB, gigabytes * GB, fill, LAUNCH, source, HOST)


# Peak, memory and bandwidth: NVIDIA's data sheets and architecture papers. Efficiency: operations of the model over the
# published time of one card where there is one; cards of the same chip and the like power limit are put beside it.
_ADA_PUBLISHED = "NVIDIA data sheet; efficiency from FLUX.1, PixArt and SD3 on one L40 in xDiT's documentation"
_ADA_LIKE = "NVIDIA data sheet; efficiency as of the L40, less for the same power spread over a higher peak"
DEVICES: tuple[Device, ...] = (
    _card("l40", 181, 0.66, 48, 864, 142, _ADA_PUBLISHED),
    _card("l40s", 362, 0.40, 48, 864, 142, _ADA_LIKE),
    _card("l20", 119.5, 0.86, 48, 864, 92, "NVIDIA data sheet; efficiency from HunyuanVideo in xDiT's documentation"),
    _card("l4", 121, 0.45, 24, 300, 58, _ADA_LIKE),
    _card("a100", 312, 0.65, 80, 2039, 108, "NVIDIA data sheet (80 GB, SXM); efficiency as of large GEMMs and flash"),
    _card("h100", 989, 0.50, 80, 3350, 132, "NVIDIA data sheet (SXM); efficiency of FlashAttention-2 and cuBLAS"),
    _card("h200", 989, 0.50, 141, 4800, 132, "NVIDIA data sheet; efficiency as of the H100, the same chip"),
    _card(
        "h20", 148, 0.85, 96, 4000, 78, "NVIDIA data sheet; efficiency as of cards with little peak for their memory"
    ),
    _card("rtx4090", 165, 0.85, 24, 1008, 128, "NVIDIA Ada paper; float32 sums at half rate are easily reached"),
    _card("rtx3090", 71, 0.85, 24, 936, 82, "NVIDIA Ampere GA102 paper; float32 sums at half rate are easily reached"),
)


def device_named(name: str) -> Device:
    """A card by its name, in any case.

    Raises:
        ValueError: It is unknown; lists those known.
    """
    for device in DEVICES:
        if device.name == name.strip().lower():
            return device
    known = ", ".join(device.name for device in DEVICES)
    raise ValueError(f"device {name!r} is unknown: use {known}, or measure your own with `patchpipe profile`")
