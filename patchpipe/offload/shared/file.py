"""Memory that several processes of a host map: a file that has no name and is in no folder.

A file in ``/dev/shm`` would do the same. But containers have 64 MB there, and a process that is killed leaves its files
behind.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where other processes find a file while it is open.

    Attributes:
        path: Its path, by the process that made it.
        mark: What it is called, which no other is.
        nbytes: Bytes of it.
    """

    path: str
    mark: str
    nbytes: int

    def mapped(self, *, private: bool) -> Tensor:
        """Its bytes, for as long as the tensor lives.

        Args:
            private: What is written there changes this process's own pages alone.

        Raises:
            OSError: It cannot be opened from here, or is another file.
        """
        found = os.readlink(self.path)  # a process of another namespace may have the same number
        if self.mark not in found:
            raise OSError(f"{self.path} is another file here")
        try:
            storage = torch.UntypedStorage.from_file(self.path, not private, self.nbytes)
        except RuntimeError as error:
            raise OSError(str(error)) from error
        return torch.empty(0, dtype=torch.uint8).set_(storage)


class MemoryFile:
    """A file in memory, which goes when it is closed and nobody maps it any more.

    Args:
        nbytes: Bytes of it.

    Attributes:
        place: Where other processes find it.

    Raises:
        OSError: There is no memory for it.
    """

    def __init__(self, nbytes: int) -> None:
        mark = f"patchpipe-{secrets.token_hex(8)}"
        self._file = os.memfd_create(mark)
        self.place = Place(f"/proc/{os.getpid()}/fd/{self._file}", mark, nbytes)
        try:
            os.posix_fallocate(self._file, 0, nbytes)  # too little memory is an error here, not a signal later
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Has nobody map it from now on."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> MemoryFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
