"""PipeFusion told naively, to compare patchpipe with; it shares no code with it.

For every patch the *whole* transformer runs on the *whole* latent, and of its output only the rows of that patch
are kept. What makes it PipeFusion is what attention sees: keys and values come from a table with one row per token,
in which this pass refreshes the rows of its own patch (and, for the first patch, those of the text), while all other
rows stay as an earlier pass left them. A transformer mixes rows in attention alone, so the rest of the pass is waste,
but harmless. Nothing is cut, so there are no positions, hooks or stages to get wrong. Rows nobody has computed yet
are NaN: to read one would show.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Facts:
    """What is to be known of a class of transformers beside what its latent's shape tells.

    Attributes:
        dim: Of the latent, along which it is cut.
        pixels: How many entries of the latent are one token, in a frame.
        text_first: Whether text stands before the picture in attention.
        aside: Parts whose attention is among text alone.
        joined: Whether the picture attends to itself and the text at once, though the text asks nothing.
        mixes: Whether rows meet in sums and convolutions instead of attention.
    """

    dim: int = 2
    pixels: int = 4
    text_first: bool = False
    aside: tuple[str, ...] = ()
    joined: bool = False
    mixes: bool = False


TOKENS_TEXT_FIRST = Facts(dim=1, pixels=1, text_first=True)
TEXT_FIRST_2D = Facts(text_first=True)
IMAGES = {
    **dict.fromkeys(
        ("ChromaTransformer2DModel", "OvisImageTransformer2DModel", "LongCatImageTransformer2DModel",
         "BriaTransformer2DModel"), TOKENS_TEXT_FIRST,
    ),
    **dict.fromkeys(
        ("AuraFlowTransformer2DModel", "CogView3PlusTransformer2DModel", "GlmImageTransformer2DModel",
         "Lumina2Transformer2DModel"), TEXT_FIRST_2D,
    ),
    "Krea2Transformer2DModel": Facts(dim=1, pixels=1, text_first=True, aside=("text_fusion",)),
    "DiTTransformer2DModel": Facts(),
    "ErnieImageTransformer2DModel": Facts(pixels=1),
    "BriaFiboTransformer2DModel": TOKENS_TEXT_FIRST,
    "HiDreamImageTransformer2DModel": Facts(),
    "HunyuanDiT2DModel": Facts(),
    "Kandinsky5Transformer3DModel": Facts(pixels=4 * 4, aside=("text_transformer_blocks.0",)),  # channels last
    "SanaTransformer2DModel": Facts(mixes=True),
    "PRXTransformer2DModel": Facts(text_first=True, joined=True),
}  # fmt: skip
PACKED = ("FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel",
          "LTXVideoTransformer3DModel")  # fmt: skip
TEXT_FIRST = (*PACKED, "CogView4Transformer2DModel")  # in attention
LISTED = ("ZImageTransformer2DModel",)  # whose latent is a list


@dataclass
class History:
    """What is known of one layer's keys, or of its values.

    Attributes:
        true: The last true row of every token.
        change: Its last change, in the 255 steps that eight bits have.
        shown: What attention sees.
    """

    true: Tensor
    change: Tensor
    shown: Tensor


Table = dict[int, list[History]]  # by attention layer, in the order they run: keys and values


class _Mixing(TorchFunctionMode):
    """Sums over all rows and convolutions in one pass over one patch: what other patches have is from their last one.

    Args:
        table: What is known, by layer: products of values and keys by patch, rows of convolutions.
        patches: The tokens of every patch.
        fresh: Those of this pass.
        row: Tokens of a row.
    """

    def __init__(self, table: dict[Any, Any], patches: Sequence[range], fresh: range, row: int) -> None:
        super().__init__()
        self.table, self.patches, self.fresh, self.row = table, patches, fresh, row
        self.products = self.convolutions = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.matmul:
            self.products += 1
            if self.products % 2:  # values by keys; the other one is by queries
                return self._sum(func, *args)
        if func is torch.conv2d and args[6] > 1:  # groups: of all convolutions the one that is not by row
            self.convolutions += 1
            return func(self._rows(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))

    def _sum(self, func: Any, value: Tensor, key: Tensor) -> Tensor:
        parts = self.table.setdefault(("products", self.products), {})
        for index, tokens in enumerate(self.patches):
            if tokens.start in self.fresh:
                own = slice(tokens.start, tokens.stop)
                parts[index] = func(value[..., own], key[..., own, :])
        return torch.stack(list(parts.values())).sum(0)

    def _rows(self, rows: Tensor) -> Tensor:
        known = self.table.setdefault(("rows", self.convolutions), torch.zeros_like(rows))
        own = slice(self.fresh.start // self.row, self.fresh.stop // self.row)
        known[:, :, own] = rows[:, :, own]
        return known


class _Pass(TorchFunctionMode):
    """The self-attention of one pass over one patch."""

    def __init__(
        self,
        table: Table,
        tokens: int,
        fresh: range,
        exist: int,
        with_text: bool,
        text_first: bool,
        pace: tuple[float, bool] | None = None,
        joined: bool = False,
        references: tuple[int, bool, bool] = (0, False, False),
    ) -> None:
        super().__init__()
        self.pace = pace  # how far on the noise level has gone, and whether it is the last one's; of a forecast
        self.table, self.tokens, self.fresh, self.exist = table, tokens, fresh, exist
        self.with_text, self.text_first = with_text, text_first
        self.layer, self.idle, self.joined = -1, False, joined
        self.references = references  # how many rows follow the picture's, whether they are refreshed, and there at all

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention or self.idle:
            return func(*args, **(kwargs or {}))
        named = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
        query, key, value = named.pop("query"), named.pop("key"), named.pop("value")
        if query.shape[2] != key.shape[2] and not self.joined:  # cross-attention: the text does not change
            return func(*args, **(kwargs or {}))
        self.layer += 1
        rows, seen = self._rows(key, value)
        if named.get("attn_mask") is not None:  # of keys, the same in every pass
            named["attn_mask"] = named["attn_mask"][..., seen]
        return func(query, *rows, **named)

    def _rows(self, *computed: Tensor) -> tuple[list[Tensor], list[int]]:
        blank = [torch.full_like(rows, torch.nan) for rows in computed]
        table = self.table.setdefault(self.layer, [History(one, torch.zeros_like(one), one.clone()) for one in blank])
        count, with_references, there = self.references
        text_count = computed[0].shape[2] - self.tokens - count
        image_at, text_at = (text_count, 0) if self.text_first else (0, self.tokens)
        text = [text_at + row for row in range(text_count)]
        others = [image_at + self.tokens + row for row in range(count)]
        refreshed = [image_at + row for row in self.fresh] + (text if self.with_text else [])
        refreshed += others if with_references else []
        seen = sorted([image_at + row for row in range(self.exist)] + text + (others if there else []))
        for kept, rows in zip(table, computed, strict=True):
            self._refresh(kept, rows, refreshed)
        return [kept.shown[:, :, seen] for kept in table], seen

    def _refresh(self, kept: History, rows: Tensor, refreshed: list[int]) -> None:
        new = rows[:, :, refreshed]
        if self.pace is not None and self.with_text:  # the first patch of a step, or all of it
            kept.shown = kept.true + self._worth(kept, new, refreshed) * kept.change
        if self.pace is not None:
            change = new - kept.true[:, :, refreshed]
            change = torch.where(change.isnan(), 0.0, change) + self.pace[1] * kept.change[:, :, refreshed]
            step = change.abs().amax(-1, keepdim=True) / 127
            kept.change[:, :, refreshed] = torch.where(step == 0, 0.0, (change / step).round() * step)
        kept.true[:, :, refreshed] = new
        kept.shown[:, :, refreshed] = new

    def _worth(self, kept: History, new: Tensor, refreshed: list[int]) -> Tensor:
        """How far on each head is shown: not at all where the change does not go on."""
        assert self.pace is not None
        ahead = self.pace[0] * kept.change[:, :, refreshed]
        came = torch.nan_to_num(new - kept.true[:, :, refreshed])
        worth = (came * ahead).sum((2, 3), keepdim=True) > (ahead * ahead).sum((2, 3), keepdim=True) / 4
        return torch.where(worth, self.pace[0], 0.0)


class _Naive:
    """What stands in for one transformer's ``forward``."""

    def __init__(
        self,
        model: Any,
        patch_rows: Sequence[int],
        warmup: int,
        branches: int,
        forecast: bool = False,
        references: int = 0,
    ) -> None:
        self.references = references
        self.forecast, self.times = forecast, [list[float]() for _ in range(branches)]
        self.names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.forward, self.patch_rows, self.warmup = model.forward, patch_rows, warmup
        kind = type(model).__name__
        self.packed, self.listed, self.text_first = kind in PACKED, kind in LISTED, kind in TEXT_FIRST
        self.facts = IMAGES.get(kind)
        if self.facts is not None:
            self.text_first = self.facts.text_first
        self.tables: list[Table] = [{} for _ in range(branches)]
        self.mixed: list[dict[Any, Any]] = [{} for _ in range(branches)]
        self.calls = 0
        self.attention: _Pass | None = None
        for part in _aside(model):  # attention among text alone, whole in every pass
            part.forward = self._aside(part.forward)

    def _aside(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def aside(*args: Any, **kwargs: Any) -> Any:
            assert self.attention is not None
            self.attention.idle = True
            result = forward(*args, **kwargs)
            self.attention.idle = False
            return result

        return aside

    def __call__(self, *args: Any, **kwargs: Any) -> Transformer2DModelOutput:
        step, branch = divmod(self.calls, len(self.tables))
        pace = self._pace(branch, {**dict(zip(self.names, args, strict=False)), **kwargs}) if self.forecast else None
        if "hidden_states" in kwargs:
            args = (kwargs.pop("hidden_states"), *args)
        latent = torch.stack(args[0]) if self.listed else args[0]
        dim = 1 if self.packed else 3 if self.listed else self.facts.dim if self.facts else 2
        rows = sum(self.patch_rows)
        units = (latent.shape[dim] - self.references) // rows  # of the latent, per row of tokens
        assert units * rows == latent.shape[dim] - self.references
        tokens_per_row = units if self.packed else prod(size // 2 for size in latent.shape[dim + 1 :])
        if self.facts is not None:
            others = latent.shape[dim + 1 :] if self.facts.pixels > 1 or dim == 2 else ()
            tokens_per_row = units * prod(others) // self.facts.pixels
        self.calls += 1
        patches = [rows] if step < self.warmup else list(self.patch_rows)
        results, start = [], 0
        for index, count in enumerate(patches):
            stop = start + count
            fresh = range(start * tokens_per_row, stop * tokens_per_row)
            exist = rows if step > 0 else stop  # no earlier step has computed the rest
            sizes = rows * tokens_per_row, fresh, exist * tokens_per_row
            joined = self.facts is not None and self.facts.joined
            last = stop == rows
            references = self.references, last, step > 0 or last
            self.attention = _Pass(self.tables[branch], *sizes, index == 0, self.text_first, pace, joined, references)
            bounds = list(itertools.accumulate(self.patch_rows, initial=0))
            spans = [range(low * tokens_per_row, high * tokens_per_row) for low, high in itertools.pairwise(bounds)]
            mixes = self.facts is not None and self.facts.mixes
            mixing = _Mixing(self.mixed[branch], spans, fresh, tokens_per_row) if mixes else nullcontext()
            with self.attention, mixing:
                returned = self.forward(*args, **{**kwargs, "return_dict": False})
            result = returned if isinstance(returned, Tensor) else returned[0]
            whole = torch.stack(result) if self.listed else result
            results.append(whole.narrow(dim, start * units, count * units + (self.references if last else 0)))
            start = stop
        prediction = torch.cat(results, dim=dim)
        return Transformer2DModelOutput(sample=list(prediction) if self.listed else prediction)

    def _pace(self, branch: int, given: dict[str, Any]) -> tuple[float, bool]:
        """The step to this noise level, in steps that led to the last one."""
        now, known = float(given["t" if self.listed else "timestep"].max()), self.times[branch]
        again = bool(known) and known[-1] == now
        ahead = (now - known[-1]) / (known[-1] - known[-2]) if len(known) > 1 else 0.0
        if not again:
            known.append(now)
        return min(max(ahead, 0.0), 4.0), again


def _aside(model: Any) -> list[Any]:
    facts = IMAGES.get(type(model).__name__, Facts())
    return [*getattr(model, "context_refiner", ()), *map(model.get_submodule, facts.aside)]


@contextmanager
def naive_pipefusion(
    pipe: Any,
    patch_rows: Sequence[int],
    warmup: int,
    *,
    branches: int = 1,
    forecast: bool = False,
    references: int = 0,
) -> Iterator[None]:
    """While it lasts, a request of the pipeline runs as PipeFusion would.

    Args:
        pipe: A plain diffusers pipeline.
        patch_rows: Token rows of each patch.
        warmup: Calls per transformer and guidance branch that run the latent whole.
        branches: Guidance branches that the pipeline computes in calls of their own, one after the other.
        forecast: Whether stale rows are shown where they will be.
        references: Tokens of pictures that follow the one that is painted; they go with its last patch.
    """
    models = [part for name, part in pipe.components.items() if name.startswith("transformer") and part is not None]
    for model in models:
        model.forward = _Naive(model, patch_rows, warmup, branches, forecast, references)
    try:
        yield
    finally:
        for model in models:
            del model.forward
            for part in _aside(model):
                del part.forward
