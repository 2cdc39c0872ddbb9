"""What the planner knows of a device."""

from __future__ import annotations

from dataclasses import dataclass

# Seconds the host takes to start a kernel of an eager block, the Python of its modules included. No run on slower cards
# contradicts it (PixArt in 8 stages on L40 leaves 18 µs); FLUX.1 on 4 H100, which waits for its host, takes twice that.
HOST = 15e-6
GB = 10**9
GIB = 2**30
UPLOAD = 24 * GB  # bytes a second of a ×16 slot of PCIe 4.0 from pinned memory


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
        upload: Bytes a second that its host copies into its memory.
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
    upload: float = UPLOAD

    def __post_init__(self) -> None:
        for name in ("flops", "efficiency", "memory", "bandwidth", "upload"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} of device {self.name} must be above 0")
        for name in ("fill", "launch", "host"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} of device {self.name} must be 0 or more")

    @property
    def rate(self) -> float:
        """Operations a second that large products really get."""
        return self.flops * self.efficiency
