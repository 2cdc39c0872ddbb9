"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def check_writable(path: Path) -> None:
    """Makes sure that a file can be written to ``path``; makes its folder.

    Raises:
        ValueError: It cannot.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def check_new(path: Path, force: bool) -> None:
    """Makes sure that a file can be written to ``path`` and, without ``force``, that none is lost by it.

    Raises:
        ValueError: It cannot, or there is one.
    """
    check_writable(path)
    if path.exists() and not force:
        raise ValueError(f"{path} is already there: name another file, or add --force to overwrite it")


def free_name(path: Path, count: int = 1) -> Path:
    """``path``, or ``NAME-2``, ``NAME-3``, … where the files that ``numbered`` makes of it would overwrite any."""
    number, free = 1, path
    while any(file.exists() for file in numbered(free, count)):
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def write_text(text: str, path: Path) -> None:
    """Writes a text file so that it is either whole or not there."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def numbered(path: Path, count: int) -> list[Path]:
    """Names for ``count`` files: ``out.png``, or ``out-1.png``, ``out-2.png``, …"""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, count + 1)]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well, and goes otherwise."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_figure(figure: Any, out: Path) -> None:
    """Writes a figure of matplotlib's, whole or not at all, in the format that the file's suffix names.

    Raises:
        ValueError: matplotlib knows no such format.
    """
    known = figure.canvas.get_supported_filetypes()
    kind = out.suffix[1:].lower()
    if kind not in known:
        raise ValueError(f"{out} must end in a format of pictures: .{', .'.join(sorted(known))}")
    with replacing(out) as temporary:
        figure.savefig(temporary, format=kind)
