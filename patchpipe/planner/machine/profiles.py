"""A machine as the planner sees it: a kind of device and the link between them, kept as a file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchpipe.files import write_text
from patchpipe.planner.machine.cards import device_named
from patchpipe.planner.machine.devices import Device
from patchpipe.planner.machine.links import Link, link_named

VERSION = 2


@dataclass(frozen=True)
class Profile:
    """Devices of one kind and the link between them.

    Attributes:
        device: The device.
        link: The link.
        dtype: In what the device's figures are meant, and a model is loaded as a rule.
        slowdown: Compute takes this many times what the device's figures say; a measured run calibrates it.
    """

    device: Device
    link: Link
    dtype: str = "bf16"
    slowdown: float = 1.0

    def __post_init__(self) -> None:
        if not self.slowdown > 0:
            raise ValueError(f"slowdown={self.slowdown} must be above 0")

    @classmethod
    def named(cls, device: str, link: str) -> Profile:
        """A known card on a known link.

        Raises:
            ValueError: One of them is unknown; lists those known.
        """
        return cls(device_named(device), link_named(link))

    def save(self, path: Path) -> None:
        """Writes the profile as JSON."""
        write_text(json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=1) + "\n", path)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no profile, or one of another version.
        """
        file = Path(path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"there is no profile {path}: write one with `patchpipe profile -o {path}`")
        try:
            return cls._read(json.loads(file.read_text(encoding="utf-8")), file)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no profile ({error}): write one with `patchpipe profile`") from error

    @classmethod
    def _read(cls, data: dict[str, Any], file: Path) -> Profile:
        if data.get("version") != VERSION:
            raise ValueError(
                f"{file} is a profile of version {data.get('version')}, this patchpipe reads version {VERSION}: "
                f"write it anew with `patchpipe profile -o {file}`"
            )
        return cls(Device(**data["device"]), Link(**data["link"]), data["dtype"], float(data["slowdown"]))
