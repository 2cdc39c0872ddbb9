"""A request between two steps, as data: to be kept, written to a file, and gone on with on any engine."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchpipe.files import replacing


@dataclass(frozen=True)
class Checkpoint:
    """The state of a request after a step: its latent, scheduler, generators and prompt embeddings, in host memory.

    It goes on with ``engine.submit(..., checkpoint=...)``, given the arguments that it began with, on an engine of the
    same model with any layout. Nothing in it is run when it is read: it is a safetensors file.

    Attributes:
        data: The file's bytes.
    """

    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self._header.get("step"), int):
            raise ValueError("this is no checkpoint of a request")

    @property
    def step(self) -> int:
        """Steps that are over."""
        return int(self._header["step"])

    @property
    def pipeline(self) -> str:
        """The pipeline's class."""
        return str(self._header["pipeline"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a file."""
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(self.data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is something else.
        """
        return cls(Path(path).read_bytes())

    @property
    def _header(self) -> dict[str, Any]:
        try:
            size = int.from_bytes(self.data[:8], "little")
            found = json.loads(json.loads(self.data[8 : 8 + size])["__metadata__"]["patchpipe"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no checkpoint of a request: {error}") from error
        return found if isinstance(found, dict) else {}
