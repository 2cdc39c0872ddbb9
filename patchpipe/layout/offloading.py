"""What a user asks of weights that do not stay on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from patchpipe.layout.checks import check_at_least, check_positive, plain_numbers

Gating = Literal["auto", "on", "off"]
Tier = Literal["host", "disk"]
AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True)
class OffloadConfig:
    """How the weights of a rank's blocks come to the device in chunks, while the blocks before them compute.

    Pictures are the same to the bit, whatever is set here.

    Args:
        memory: GiB of the device for the weights of a rank's blocks, those that stay and those that come and go.
            ``None`` takes what a device has left beside text encoders, keys and values and activations.
        resident: Share of the blocks' weights that stays on the device, 0 to 1. ``None`` takes as much as the memory
            allows.
        chunk: Megabytes that are copied at once. A copy that has begun cannot be stopped, so this is how long a
            collective may have to share the link with it. ``None`` takes about 16.
        depth: Chunks that may be on the device before the block that they belong to is called. ``None`` takes what
            the model of the transfers says is quickest.
        gate: Whether chunks wait while an exchange with other ranks is on its way. ``"auto"`` lets the model decide.
        tier: ``"host"`` keeps the weights in host memory, pinned where there is CUDA; ``"disk"`` reads them from the
            model's safetensors files each time, for hosts without the memory.
        gathered: Whether the ranks of a Ulysses or Ring line copy a part of each chunk each, and give it to the others
            over the links between them. It pays where these are faster than the host's, as NVLink is.
        throttle: Gigabytes a second that come from there at most, for trials on machines without a GPU.

    Raises:
        ValueError: A field is out of range.
    """

    memory: float | None = None
    resident: float | None = None
    chunk: float | None = None
    depth: int | None = None
    gate: Gating = "auto"
    tier: Tier = "host"
    gathered: bool = False
    throttle: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "depth", plain_numbers(self.depth))
        check_positive("offload memory", self.memory, "GiB")
        check_positive("offload chunk", self.chunk, "megabytes")
        check_positive("offload throttle", self.throttle, "gigabytes a second")
        if self.depth is not None:
            check_at_least("offload depth", self.depth, 1)
        share = self.resident
        if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1):
            raise ValueError(f"offload resident={share!r} must be a share between 0 and 1")
        if not isinstance(self.gathered, bool):
            raise ValueError(f"offload gathered={self.gathered!r} must be True or False")
        if self.gate not in ("auto", "on", "off"):
            raise ValueError(f"offload gate={self.gate!r} is unknown: use 'auto', 'on' or 'off'")
        if self.tier not in ("host", "disk"):
            raise ValueError(f"offload tier={self.tier!r} is unknown: use 'host' or 'disk'")

    @classmethod
    def of(cls, value: Any) -> OffloadConfig | None:
        """Reads what was given as ``offload``: one of these, its fields, ``"auto"``, or nothing.

        Raises:
            ValueError: It is none of these.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            known = [field.name for field in dataclasses.fields(cls)]
            unknown = [name for name in value if name not in known]
            if unknown:
                raise ValueError(f"offload has no {unknown[0]!r}: use {', '.join(known)}")
            return cls(**value)
        if value == AUTO:
            return cls()
        raise ValueError(f"offload={value!r} must be an OffloadConfig, 'auto' or None")

    @classmethod
    def read(cls, text: str) -> OffloadConfig:
        """Reads ``auto``, a number of GiB, or ``name=value`` pairs with commas between them.

        Raises:
            ValueError: It is none of these.
        """
        text = text.strip()
        if text == AUTO:
            return cls()
        pairs = {"memory": text} if "=" not in text else dict(_pair(part) for part in text.split(","))
        found = cls.of({name: _value(name, value) for name, value in pairs.items()})
        assert found is not None
        return found

    @property
    def words(self) -> str:
        """What ``read`` reads."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value != _DEFAULTS[name]}
        return ",".join(f"{name}={_word(value)}" for name, value in given.items()) or AUTO

    def describe(self) -> str:
        """A few words for people."""
        if self.resident is not None:
            return f"offload, {self.resident:.0%} resident"
        return "offload" if self.memory is None else f"offload to {self.memory:g} GiB"


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(OffloadConfig)}


def _pair(part: str) -> tuple[str, str]:
    name, sign, value = part.partition("=")
    if not sign:
        raise ValueError(f"--offload: {part!r} must look like name=value, such as memory=8 or resident=0.4")
    return name.strip(), value.strip()


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _value(name: str, text: str) -> Any:
    if name in ("gate", "tier"):
        return text
    if name == "gathered":
        if text not in ("on", "off"):
            raise ValueError(f"--offload gathered={text} must be on or off")
        return text == "on"
    try:
        return int(text) if name == "depth" else float(text)
    except ValueError:
        kind = "a whole number" if name == "depth" else "a number"
        raise ValueError(f"--offload {name}={text} must be {kind}; or say --offload auto") from None
