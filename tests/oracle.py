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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

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


class _Pass(TorchFunctionMode):
    """The self-attention of one pass over one patch."""

    def __init__(
        self,
        table: Table,
        tokens: int,
        fresh: Sequence[int],
        exist: Sequence[int],
        with_text: bool,
        text_first: bool,
        pace: tuple[float, bool] | None = None,
        stands_for: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.stands_for = stands_for  # the token in whose place each is shown from then on
        self.pace = pace  # how far on the noise level has gone, and whether it is the last one's; of a forecast
        self.table, self.tokens, self.fresh, self.exist = table, tokens, fresh, exist
        self.with_text, self.text_first = with_text, text_first
        self.layer, self.idle = -1, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention or self.idle:
            return func(*args, **(kwargs or {}))
        named = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
        query, key, value = named.pop("query"), named.pop("key"), named.pop("value")
        if query.shape[2] != key.shape[2]:  # cross-attention: the text does not change
            return func(*args, **(kwargs or {}))
        self.layer += 1
        rows, seen = self._rows(key, value)
        if named.get("attn_mask") is not None:  # of keys, the same in every pass
            named["attn_mask"] = named["attn_mask"][..., seen]
        return func(query, *rows, **named)

    def _rows(self, *computed: Tensor) -> tuple[list[Tensor], list[int]]:
        blank = [torch.full_like(rows, torch.nan) for rows in computed]
        table = self.table.setdefault(self.layer, [History(one, torch.zeros_like(one), one.clone()) for one in blank])
        text_count = computed[0].shape[2] - self.tokens
        image_at, text_at = (text_count, 0) if self.text_first else (0, self.tokens)
        text = [text_at + row for row in range(text_count)]
        refreshed = [image_at + row for row in self.fresh] + (text if self.with_text else [])
        seen = sorted([image_at + row for row in self.exist] + text)
        for kept, rows in zip(table, computed, strict=True):
            self._refresh(kept, rows, refreshed)
        shown = [kept.shown[:, :, seen] for kept in table]
        for kept in table if self.stands_for else []:
            image = slice(image_at, image_at + self.tokens)
            for rows in (kept.true, kept.shown):
                rows[:, :, image] = rows[:, :, [image_at + row for row in self.stands_for]]
        return shown, seen

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
        coarse: bool = False,
    ) -> None:
        self.coarse = coarse
        self.forecast, self.times = forecast, [list[float]() for _ in range(branches)]
        self.names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.forward, self.patch_rows, self.warmup = model.forward, patch_rows, warmup
        kind = type(model).__name__
        self.packed, self.listed, self.text_first = kind in PACKED, kind in LISTED, kind in TEXT_FIRST
        self.tables: list[Table] = [{} for _ in range(branches)]
        self.calls = 0
        self.attention: _Pass | None = None
        for part in getattr(model, "context_refiner", ()):  # attention among text alone, whole in every pass
            part.forward = self._aside(part.forward)

    def _aside(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def aside(*args: Any, **kwargs: Any) -> Any:
            assert self.attention is not None
            self.attention.idle = True
            result = forward(*args, **kwargs)
            self.attention.idle = False
            return result

        return aside

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any]:
        step, branch = divmod(self.calls, len(self.tables))
        pace = self._pace(branch, {**dict(zip(self.names, args, strict=False)), **kwargs}) if self.forecast else None
        if "hidden_states" in kwargs:
            args = (kwargs.pop("hidden_states"), *args)
        latent = torch.stack(args[0]) if self.listed else args[0]
        dim = 1 if self.packed else 3 if self.listed else 2
        rows = sum(self.patch_rows)
        units = latent.shape[dim] // rows  # of the latent, per row of tokens
        assert units * rows == latent.shape[dim]
        tokens_per_row = units if self.packed else prod(size // 2 for size in latent.shape[dim + 1 :])
        self.calls += 1
        patches = [rows] if step < self.warmup else list(self.patch_rows)
        results, start = [], 0
        if step == 0 and self.coarse:
            self._start(branch, rows, tokens_per_row, pace, args, kwargs)
        for index, count in enumerate(patches):
            stop = start + count
            fresh = range(start * tokens_per_row, stop * tokens_per_row)
            exist = rows if step > 0 or self.coarse else stop  # no earlier step has computed the rest
            sizes = rows * tokens_per_row, fresh, range(exist * tokens_per_row)
            self.attention = _Pass(self.tables[branch], *sizes, index == 0, self.text_first, pace)
            with self.attention:
                result = self.forward(*args, **{**kwargs, "return_dict": False})[0]
            whole = torch.stack(result) if self.listed else result
            results.append(whole.narrow(dim, start * units, count * units))
            start = stop
        prediction = torch.cat(results, dim=dim)
        return (list(prediction) if self.listed else prediction,)

    def _start(self, branch: int, rows: int, width: int, pace: Any, args: Any, kwargs: Any) -> None:
        """A pass in which every second token of every second row is all there is; it then stands for its neighbours."""
        places = [(row, column) for row in range(rows) for column in range(width)]
        stands_for = [row // 2 * 2 * width + column // 2 * 2 for row, column in places]
        sample = sorted(set(stands_for))
        self.attention = _Pass(
            self.tables[branch], rows * width, sample, sample, True, self.text_first, pace, stands_for
        )
        with self.attention:
            self.forward(*args, **{**kwargs, "return_dict": False})

    def _pace(self, branch: int, given: dict[str, Any]) -> tuple[float, bool]:
        """The step to this noise level, in steps that led to the last one."""
        now, known = float(given["t" if self.listed else "timestep"].max()), self.times[branch]
        again = bool(known) and known[-1] == now
        ahead = (now - known[-1]) / (known[-1] - known[-2]) if len(known) > 1 else 0.0
        if not again:
            known.append(now)
        return min(max(ahead, 0.0), 4.0), again


@contextmanager
def naive_pipefusion(
    pipe: Any,
    patch_rows: Sequence[int],
    warmup: int,
    *,
    branches: int = 1,
    forecast: bool = False,
    coarse: bool = False,
) -> Iterator[None]:
    """While it lasts, a request of the pipeline runs as PipeFusion would.

    Args:
        pipe: A plain diffusers pipeline.
        patch_rows: Token rows of each patch.
        warmup: Calls per transformer and guidance branch that run the latent whole.
        branches: Guidance branches that the pipeline computes in calls of their own, one after the other.
        forecast: Whether stale rows are shown where they will be.
        coarse: Whether a quarter of the tokens goes ahead, and stands for all.
    """
    models = [part for name, part in pipe.components.items() if name.startswith("transformer") and part is not None]
    for model in models:
        model.forward = _Naive(model, patch_rows, warmup, branches, forecast, coarse)
    try:
        yield
    finally:
        for model in models:
            del model.forward
            for part in getattr(model, "context_refiner", ()):
                del part.forward
