"""Reads single tensors out of a diffusers checkpoint, one at a time, and nothing else of it."""

from __future__ import annotations

import json
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from patchpipe.offload.weights import Stored
from patchpipe.parallel.tensor import Slice

STEM = "diffusion_pytorch_model"
ENCODER_STEM = "model"  # of transformers
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
MAPPED_BYTES = 64 * 2**20  # a file is opened anew after so much of it was read


class Checkpoint:
    """The weights of one model folder: a single safetensors file or shards with an index.

    Args:
        folder: The folder with the weights.
        variant: For example ``"fp16"`` for ``diffusion_pytorch_model.fp16.safetensors``.
        stem: What its files are called.

    Raises:
        FileNotFoundError: No weights, only pickled ones, or a shard named by the index is missing.
    """

    def __init__(self, folder: Path, variant: str | None = None, stem: str = STEM) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        infix = f".{variant}" if variant else ""
        index = folder / f"{stem}.safetensors.index{infix}.json"
        single = folder / f"{stem}{infix}.safetensors"
        if index.is_file():
            self._read_index(index)
        elif single.is_file():
            with _opened(single) as file:
                self._file_of = dict.fromkeys(file.keys(), single)
        else:
            raise FileNotFoundError(_no_weights(folder, variant))

    @property
    def names(self) -> list[str]:
        """Names of all the tensors."""
        return list(self._file_of)

    @property
    def files(self) -> list[Path]:
        """The files they are in."""
        return sorted(set(self._file_of.values()))

    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor as it is stored, by the headers of the files."""
        found = {}
        for path in self.files:
            _, header = _header(path)
            offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
            found.update({name: stop - start for name, (start, stop) in offsets.items()})
        return found

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors as they are stored, on the CPU."""
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._file_of[name]].append(name)
        found = {}
        for path, chosen in by_file.items():
            with _opened(path) as file:
                found.update({name: file.get_tensor(name).clone() for name in chosen})  # not of the mapped file
        return found

    def check_complete(self, missing: list[str]) -> None:
        """Says what a checkpoint lacks.

        Raises:
            ValueError: Anything is missing.
        """
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"the weights in {self.folder} lack {', '.join(missing[:3])}{more}: the checkpoint is incomplete or "
                f"belongs to another configuration"
            )

    def dtype(self) -> torch.dtype:
        """How most of the floating-point tensors are stored, by the headers of the files."""
        counts: Counter[str] = Counter()
        for path in self.files:
            with _opened(path) as file:
                counts.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118 - no mapping
        known = [(count, name) for name, count in counts.items() if name in STORED]
        return STORED[max(known)[1]] if known else torch.float32

    def fill(
        self,
        model: nn.Module,
        names: Iterable[str],
        dtype_of: dict[str, torch.dtype],
        device: torch.device,
        slices: Mapping[str, Slice] | None = None,
    ) -> None:
        """Reads the named parameters and buffers into a model built on ``meta``.

        Args:
            model: The model.
            names: What to read.
            dtype_of: The dtype each is to have.
            device: Where each is to be.
            slices: The part of some of them to read, and no more.

        Raises:
            ValueError: A tensor is missing from the checkpoint or has another shape.
        """
        by_file: dict[Path, list[str]] = defaultdict(list)
        wanted = list(names)
        self.check_complete([name for name in wanted if name not in self._file_of])
        for name in wanted:
            by_file[self._file_of[name]].append(name)
        for path, chosen in by_file.items():
            left = iter(chosen)
            while self._read_some(model, path, left, dtype_of, device, slices or {}) >= MAPPED_BYTES:
                pass

    def as_stored(self, names: Iterable[str], dtype_of: Mapping[str, torch.dtype]) -> list[str]:
        """Those of some tensors that are stored in the dtype which they are to have, by the headers of the files."""
        wanted: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            if name in self._file_of:
                wanted[self._file_of[name]].append(name)
        found = []
        for path, chosen in wanted.items():
            _, header = _header(path)
            stored = {name: STORED.get(header[name]["dtype"]) for name in chosen}
            found += [
                name for name in chosen if stored[name] is not None and dtype_of.get(name) in (None, stored[name])
            ]
        return found

    def map(self, model: nn.Module, names: Iterable[str], dtype_of: Mapping[str, torch.dtype]) -> dict[str, Stored]:
        """Has parameters of a model built on ``meta`` lie in the files themselves, of which nothing is read yet.

        Args:
            model: The model.
            names: What lies there.
            dtype_of: The dtype each is to have.

        Returns:
            Where each of them lies.

        Raises:
            ValueError: A tensor is missing, has another shape or is stored in another dtype.
        """
        wanted, found = list(names), {}
        self.check_complete([name for name in wanted if name not in self._file_of])
        for path in sorted({self._file_of[name] for name in wanted}):
            start, header = _header(path)
            with _opened(path) as file:
                for name in (name for name in wanted if self._file_of[name] == path):
                    tensor, asked = file.get_tensor(name), dtype_of.get(name)
                    if asked not in (None, tensor.dtype):
                        raise ValueError(
                            f"{name} is stored in {tensor.dtype} but asked for in {asked}, so that it cannot be read "
                            f"from disk each time: load the model in its own dtype, or use tier='host'"
                        )
                    _check_shape(model, name, tensor.shape, path)
                    owner, _, leaf = name.rpartition(".")
                    parameter = parameter_of(tensor)
                    model.get_submodule(owner)._parameters[leaf] = parameter
                    first, last = header[name]["data_offsets"]
                    found[name] = Stored(path, start + first, last - first)
        return found

    def _read_some(
        self,
        model: nn.Module,
        path: Path,
        left: Iterator[str],
        dtype_of: dict[str, torch.dtype],
        device: torch.device,
        slices: Mapping[str, Slice],
    ) -> int:
        """Reads until enough of the file is mapped into memory; closing it gives the pages back."""
        read = 0
        with _opened(path) as file:
            for name in left:
                stored = file.get_slice(name)
                shape = torch.Size(stored.get_shape())
                _check_shape(model, name, shape, path)
                tensor = slices[name].of(stored) if name in slices else file.get_tensor(name)
                _assign(model, name, tensor, dtype_of.get(name), device)
                read += shape.numel() * tensor.element_size()  # a slice may touch every page of its tensor
                if read >= MAPPED_BYTES:
                    break
        return read

    def _read_index(self, index: Path) -> None:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        absent = sorted({name for name in weight_map.values() if not (self.folder / name).is_file()})
        if absent:
            raise FileNotFoundError(
                f"{self.folder} lacks the shard{'s' if len(absent) > 1 else ''} {', '.join(absent)} that "
                f"{index.name} names: the download is incomplete, fetch the model again"
            )
        self._file_of = {name: self.folder / file for name, file in weight_map.items()}


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where a file's tensors begin, and what it says of them."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return 8 + length, json.loads(file.read(length))


def _check_shape(model: nn.Module, name: str, shape: torch.Size, path: Path) -> None:
    owner, _, leaf = name.rpartition(".")
    expected = getattr(model.get_submodule(owner), leaf).shape
    if expected != shape:
        raise ValueError(f"{name} is {tuple(shape)} in {path.name} but {tuple(expected)} by the model's config.json")


def parameter_of(tensor: Tensor) -> nn.Parameter:
    """A parameter as ``from_pretrained`` leaves it, which could be trained.

    torch rounds some products otherwise where the weights need no gradient, even if none is recorded.
    """
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


def _assign(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype | None, device: torch.device) -> None:
    owner_path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_path)
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    moved = tensor.to(device=device, dtype=wanted)
    if moved is tensor:
        moved = tensor.clone()  # a mapped file must not be what the model computes with
    if leaf in owner._parameters:
        owner._parameters[leaf] = parameter_of(moved)
    else:
        owner._buffers[leaf] = moved


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}): fetch it again") from error


def _no_weights(folder: Path, variant: str | None) -> str:
    if any(folder.glob("*.bin")):
        return f"{folder} holds only pickled weights (.bin): save it once with save_pretrained(safe_serialization=True)"
    found = sorted(path.name for path in folder.glob("*.safetensors*"))
    kind = f"variant {variant!r}" if variant else "the default variant"
    return f"{folder} holds no weights of {kind}" + (f"; it has {', '.join(found[:4])}" if found else "")
