"""How a transformer's latent is laid out, and along which axis it is cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

IMAGE, TEXT, REFERENCE = "image", "text", "reference"
PREFIX = "prefix"  # rows before the picture that a pipeline's first call alone has; see ``plan.Prefix``
AHEAD = "ahead of the latent"  # of a call's inputs: what stands before the picture in its latent
SPACE = "fhw"  # frames, rows and columns, the order in which every model numbers its tokens
PACKED = "n"  # a dim that holds the tokens of all of them
NAMES = {"f": "frames", "h": "rows", "w": "columns"}

Sizes = Mapping[str, int]  # tokens along each axis


@dataclass(frozen=True)
class Raster:
    """How the latent of one call divides into slices of tokens along the axis that is cut, called its rows.

    Attributes:
        count: Token rows.
        tokens: Image tokens in one of them.
        units: Entries of the latent's cut dim in one of them.
        outer: Pieces that the tokens of one row lie in, in the model's order: 1 where a picture is cut by rows or a
            clip by frames, the number of frames where a clip is cut by rows.
        joined: Entries of the latent's cut dim, tokens, that follow the picture's: pictures given as references.
        room: Entries of it that come before the picture's: room for the text, whose rows ride with the first patch.
    """

    count: int
    tokens: int
    units: int
    outer: int = 1
    joined: int = 0
    room: int = 0

    @property
    def total(self) -> int:
        """Image tokens."""
        return self.count * self.tokens

    @property
    def inner(self) -> int:
        """Tokens of one of those pieces."""
        return self.tokens // self.outer


@dataclass(frozen=True)
class Latent:
    """Where the image tokens lie in the latent a transformer takes.

    Args:
        axes: A letter for each of its dims: b batch, c channels, f frames, h rows, w columns, 1 for a dim of one, or n
            for tokens in raster order.
        cut: The axis that is cut.
        sizes: Tokens along f, h and w, of those there are, for a model and the inputs of a call; where the latent is
            not packed they follow from its shape.
        name: The input.
        references: Whether pictures given as references may follow it, in its dim of tokens; see ``Holds``.
        room: Whether room for the text may come before it there. What a class predicts of it counts for nothing: where
            the text's rows are spread or shared, some of it is left zero.
        listed: Whether the model takes and gives a list, with a tensor for each entry of the batch. It is one tensor
            wherever patchpipe holds it.
        ahead: How many tokens stand before the picture in its dim of tokens, by the inputs of a call.
    """

    axes: str
    cut: str = "h"
    sizes: Callable[[nn.Module, Mapping[str, Any]], Sizes] | None = None
    name: str = "hidden_states"
    listed: bool = False
    references: bool = False
    room: bool = False
    ahead: Callable[[Mapping[str, Any]], int] | None = None

    @property
    def dim(self) -> int:
        """The latent's dim that is cut."""
        return self.axes.index(PACKED if PACKED in self.axes else self.cut)

    def joined(self, given: Any) -> Tensor:
        """The latent as one tensor, of what the model takes or gives.

        Raises:
            ValueError: It is a list of latents that differ in size, or of several for each entry of the batch.
        """
        if not self.listed:
            return given
        if any(not isinstance(each, Tensor) or each.shape != given[0].shape for each in given):
            raise ValueError(
                f"{self.name} is a list of latents that differ in size, or of several latents for one picture: only "
                f"pictures of one size, each by itself, are supported"
            )
        return torch.stack(list(given))

    def parted(self, inputs: Mapping[str, Any], *, read: bool) -> dict[str, Any]:
        """A call's inputs with what stands before the picture taken off the latent.

        Args:
            inputs: The inputs.
            read: Whether the call reads it; else zeros stand for it, and a lazy latent stays lazy.
        """
        latent = inputs[self.name]
        ahead = 0 if self.ahead is None else self.ahead(inputs)
        if not ahead:
            return dict(inputs)
        if read:
            first = latent.narrow(self.dim, 0, ahead)
        else:
            shape = (*latent.shape[: self.dim], ahead, *latent.shape[self.dim + 1 :])
            first = torch.zeros((), dtype=latent.dtype, device=latent.device).expand(shape)
        rest = latent.narrow(self.dim, ahead, latent.shape[self.dim] - ahead)
        return {**inputs, self.name: rest, AHEAD: first}

    def given(self, latent: Tensor) -> Any:
        """The reverse: as the model takes or gives it."""
        return list(latent.unbind()) if self.listed else latent

    def rows(self, model: nn.Module, shape: torch.Size, inputs: Mapping[str, Any]) -> Raster:
        """Token rows of a latent of this shape.

        Raises:
            ValueError: It has no whole number of tokens, or the inputs do not describe it.
        """
        sizes = self._from_shape(model, shape) if self.sizes is None else dict(self.sizes(model, inputs))
        axes = [axis for axis in SPACE if axis in sizes]
        at = axes.index(self.cut)
        outer, inner = (prod(sizes[axis] for axis in some) for some in (axes[:at], axes[at + 1 :]))
        if PACKED not in self.axes:
            return Raster(sizes[self.cut], outer * inner, self.spans_of(model)[self.cut], outer)
        assert outer == 1, "a packed latent is cut along its first axis"
        joined = shape[self.dim] - sizes[self.cut] * inner
        if self.room:
            return Raster(sizes[self.cut], inner, inner, room=joined)
        if joined and not self.references:
            raise ValueError(
                f"a picture of {sizes[self.cut]} × {inner} tokens is followed by {joined} others: pictures joined to "
                f"the latent as references are not supported for this model"
            )
        return Raster(sizes[self.cut], inner, inner, joined=joined)

    def _from_shape(self, model: nn.Module, shape: torch.Size) -> dict[str, int]:
        spans, found = self.spans_of(model), {}
        for axis in (axis for axis in SPACE if axis in self.axes):
            size = shape[self.axes.index(axis)]
            if size % spans[axis]:
                raise ValueError(
                    f"a latent of {size} {NAMES[axis]} is no multiple of the model's patch size {spans[axis]}"
                )
            found[axis] = size // spans[axis]
        return found

    def spans_of(self, model: nn.Module) -> dict[str, int]:
        """Entries of the latent's f, h and w that a token spans."""
        return {"f": 1, "h": 1, "w": 1, **patch_sizes(model.config)}


def patch_sizes(config: Any) -> Sizes:
    """Entries of the latent that a token spans, as most models name them: ``patch_size`` and ``patch_size_t``.

    Of a model that lists several (``all_patch_size``) it is the first one, which pipelines take.
    """
    size = getattr(config, "patch_size", None) or config.all_patch_size[0]
    if isinstance(size, (tuple, list)):
        return dict(zip(SPACE[-len(size) :], size, strict=True))
    return {"f": getattr(config, "patch_size_t", None) or 1, "h": size, "w": size}


def sizes_by_numbers(model: nn.Module, inputs: Mapping[str, Any]) -> Sizes:
    """Frames, rows and columns, which a call gives as numbers."""
    return {"f": inputs["num_frames"], "h": inputs["height"], "w": inputs["width"]}


def sizes_by_ids(
    ids: str = "img_ids", column: int = 1, *, of_text: bool = False
) -> Callable[[nn.Module, Mapping[str, Any]], Sizes]:
    """Rows and columns, read off an input with a position for each image token, ``[tokens, axes]``.

    Args:
        ids: The input.
        column: The axis of the ids that counts rows.
        of_text: Whether the positions of text come first in it.
    """

    def sizes(model: nn.Module, inputs: Mapping[str, Any]) -> Sizes:
        found = inputs[ids]
        found = found[0] if found.ndim == 3 else found
        found = found[-inputs["hidden_states"].shape[1] :] if of_text else found
        others = (found[:, :column] != found[0, :column]).any(1)  # positions of references differ in other axes
        rows = found[: int(others.int().argmax()) if others.any() else len(found), column].tolist()
        width = next((i for i, row in enumerate(rows) if row != rows[0]), len(rows))
        count, tokens = len(rows) // width, inputs["hidden_states"].shape[1]
        raster = all(len(set(rows[r * width : (r + 1) * width])) == 1 for r in range(count))
        if count * width != len(rows) or len(found) != tokens or not raster:
            raise ValueError(
                f"{ids} does not describe one picture in raster order ({len(found)} positions, {tokens} tokens)"
            )
        return {"h": count, "w": width}

    return sizes


def sizes_by_shapes(shapes: str = "img_shapes") -> Callable[[nn.Module, Mapping[str, Any]], Sizes]:
    """Rows and columns, read off an input with a list of pictures ``(frames, rows, columns)`` for each batch entry.

    Args:
        shapes: The input. Pictures after the first are references; of a model whose positions count layers
            (``use_layer3d_rope``) all but the last are layers of one picture, painted together.
    """

    def sizes(model: nn.Module, inputs: Mapping[str, Any]) -> Sizes:
        entries = [entry if isinstance(entry, list) else [entry] for entry in inputs[shapes]]
        if any(entry != entries[0] for entry in entries):
            raise ValueError(f"{shapes}={inputs[shapes]} does not describe pictures of one size for the whole batch")
        (frames, count, width), tokens = entries[0][0], inputs["hidden_states"].shape[1]
        if frames != 1 or sum(map(prod, entries[0])) != tokens:
            described = " + ".join(" × ".join(map(str, each)) for each in entries[0])
            raise ValueError(
                f"{shapes} describes {described} tokens but the latent has {tokens}: only pictures of one frame are "
                f"supported"
            )
        layers = len(entries[0]) - 1 if getattr(model, "config", {}).get("use_layer3d_rope") else 1
        if any(each != entries[0][0] for each in entries[0][:layers]):
            raise ValueError(f"{shapes}={inputs[shapes]} has layers of different sizes: only those of one size are cut")
        return {"h": layers * count, "w": width}

    return sizes


def sizes_by_roles(
    roles: str, picture: int, ids: str = "position_ids", column: int = 1
) -> Callable[[nn.Module, Mapping[str, Any]], Sizes]:
    """Rows and columns of a picture at the end of a sequence, ``[batch, tokens]``, that an input gives roles.

    Args:
        roles: The input.
        picture: The role of the picture's tokens.
        ids: The input with their positions, ``[batch, tokens, axes]``.
        column: The axis of the positions that counts rows.
    """

    def sizes(model: nn.Module, inputs: Mapping[str, Any]) -> Sizes:
        painted = inputs[roles] == picture
        count = int(painted[0].sum())
        at_end = torch.arange(painted.shape[1], device=painted.device) >= painted.shape[1] - count
        rows = inputs[ids][0, painted.shape[1] - count :, column]
        height = len(rows.unique_consecutive())
        if not count or (painted != at_end).any() or count % height or rows.unflatten(0, (height, -1)).diff().any():
            raise ValueError(
                f"{roles} and {ids} do not describe one picture in raster order at the end of each sequence: several "
                f"pictures packed into one are not supported, paint them one after the other"
            )
        return {"h": height, "w": count // height}

    return sizes


def last_of_shapes(model: nn.Module, inputs: Mapping[str, Any]) -> Sizes:
    """Rows and columns of the last of the pictures in ``img_shapes``, which is the one that is painted."""
    _, count, width = inputs["img_shapes"][0][-1]
    return {"h": count, "w": width}


def others_of_shapes(inputs: Mapping[str, Any]) -> int:
    """Tokens of all pictures in ``img_shapes`` but the last."""
    return sum(map(prod, inputs["img_shapes"][0][:-1]))


def number_of_references(inputs: Mapping[str, Any]) -> int:
    """Tokens that ``num_ref_tokens`` says stand before the picture."""
    return int(inputs.get("num_ref_tokens") or 0)
