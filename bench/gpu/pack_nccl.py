"""Packs NCCL small enough to carry: the code of one kind of card, compressed.

From 2.30 on NCCL lets several ranks share a card, so that one GPU is enough to try real NCCL between real processes.
Its library holds code for a dozen kinds of cards and is 350 MB; with the others' blanked, it packs to a tenth.

\b
  pip download --no-deps --only-binary=:all: --platform manylinux_2_27_x86_64 -d wheels nvidia-nccl-cu13==2.32.3
  python -m bench.gpu.pack_nccl wheels/nvidia_nccl_cu13-*.whl .nccl/libnccl.so.2.xz --arch 90
"""

from __future__ import annotations

import lzma
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

LIBRARY = "nvidia/nccl/lib/libnccl.so.2"
FAT, RELOCATABLE = ".nv_fatbin", "__nv_relfatbin"  # sections: code for cards, and code for a device linker alone
MAGIC, HEADER = 0xBA55ED50, "<IHHQ"  # of a fat binary: magic, version, bytes of the header, bytes of what follows
ENTRY, ARCHITECTURE = (
    "<HHIQ",
    28,
)  # of its entries: kind, version, bytes of the header, bytes of code; where the card is
ALIGNMENT = 8
PRESET = 3  # of xz: a higher one takes minutes for a few percent

Range = tuple[int, int]  # offset and bytes


@dataclass(frozen=True)
class Packed:
    """A library with the code of one kind of card.

    Attributes:
        data: The library, as long as it was.
        kept: Bytes of code left.
        blanked: Bytes of code made zero.
    """

    data: bytes
    kept: int
    blanked: int


def sections(data: bytes | bytearray) -> dict[str, Range]:
    """The sections of a 64-bit ELF file by name.

    Raises:
        ValueError: It is none.
    """
    if data[:5] != b"\x7fELF\x02":
        raise ValueError("this is no 64-bit ELF library")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    found = [struct.unpack_from("<IIQQQQ", data, table + index * size) for index in range(count)]
    start = found[names][4]

    def name(offset: int) -> str:
        return bytes(data[start + offset : data.index(b"\0", start + offset)]).decode()

    return {name(section[0]): (section[4], section[5]) for section in found}


def codes(data: bytes | bytearray, where: Range) -> Iterator[tuple[int, Range]]:
    """Every piece of code in a section of fat binaries: the kind of card, such as 90, and where it is."""
    at, end = where[0], where[0] + where[1]
    while at < end:
        magic, _, header, size = struct.unpack_from(HEADER, data, at)
        if magic != MAGIC:
            at += ALIGNMENT
            continue
        entry, at = at + header, at + header + size
        while entry < at:
            _, _, head, length = struct.unpack_from(ENTRY, data, entry)
            (card,) = struct.unpack_from("<I", data, entry + ARCHITECTURE)
            yield card, (entry + head, length)
            entry += head + length


def slimmed(library: bytes, arch: int) -> Packed:
    """The library with the code of all other cards blanked.

    Args:
        library: The whole of it.
        arch: The kind of card, as its compute capability without the point: 90 for an H100.

    Raises:
        ValueError: It holds no code for cards, or none for this one.
    """
    data, sizes = bytearray(library), Counter[int]()
    known = sections(data)
    if FAT not in known:
        raise ValueError(f"the library has no section {FAT}: there is no code for cards in it")
    for card, (start, size) in list(codes(data, known[FAT])):
        sizes[card] += size
        if card != arch:
            data[start : start + size] = bytes(size)
    if not sizes[arch]:
        raise ValueError(
            f"no code for sm_{arch} is in it, only for {', '.join(f'sm_{card}' for card in sorted(sizes))}"
        )
    start, unused = known.get(RELOCATABLE, (0, 0))
    data[start : start + unused] = bytes(unused)
    return Packed(bytes(data), sizes[arch], sizes.total() - sizes[arch] + unused)


def main(
    wheel: Annotated[Path, typer.Argument(help="An nvidia-nccl-cu1x wheel of 2.30 or later.")],
    out: Annotated[Path, typer.Argument(help="The packed library, NAME.xz.")],
    arch: Annotated[int, typer.Option(help="Compute capability without the point: 90 for H100 and H200.")] = 90,
) -> None:
    """Packs the library of a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            packed = slimmed(archive.read(LIBRARY), arch)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"error: {wheel}: {error}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(lzma.compress(packed.data, preset=PRESET))
    size = out.stat().st_size
    print(f"code for sm_{arch}: {packed.kept / 1e6:.1f} MB kept, {packed.blanked / 1e6:.0f} MB blanked; "
          f"{out} is {size / 1e6:.1f} MB")  # fmt: skip


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command(help=__doc__)(main)

if __name__ == "__main__":
    app(prog_name="python -m bench.gpu.pack_nccl")
