"""PipeFusion told naively, to compare patchpipe with; it shares no code with it.

For every patch the *whole* transformer runs on the *whole* latent, and of its output only the rows of that patch
are kept. What makes it PipeFusion is what attention sees: keys and values come from a table with one row per token,
in which this pass refreshes the rows of its own patch (and, for the first patch, those of the text), while all other
rows stay as an earlier pass left them. A transformer mixes rows in attention alone, so the rest of the pass is waste,
but harmless. Nothing is cut, so there are no positions, hooks or stages to get wrong. Rows nobody has computed yet
are NaN: to read one would show.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
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
        plane: Its dims beside that, such as rows and columns of a frame; none where its entries are tokens.
        pixels: How many of their entries are one token.
        text_first: Whether all riders stand before the picture or clip in attention.
        after: How many of them stand after it, from the call's arguments, where some stand before.
        aside: Parts whose attention is among text alone; ``blocks.*`` is every one of a list.
        sound: The argument that is the sound of the clip: it asks the clip, and the clip asks it.
        sections: Whether one call makes a clip section by section.
        joined: Whether the picture attends to itself and the text at once, though the text asks nothing.
        room: How many of the latent's entries come before the picture's: they are the first patch's.
        mixes: Whether rows meet in sums and convolutions instead of attention.
    """

    dim: int = 2
    plane: tuple[int, ...] = (3, 4)
    pixels: int = 4
    text_first: bool = False
    after: Callable[[dict[str, Any]], int] | None = None
    aside: tuple[str, ...] = ()
    sound: str = ""
    sections: bool = False
    joined: bool = False
    room: Callable[[dict[str, Any]], int] | None = None
    mixes: bool = False


CLIPS = {
    "HunyuanVideoTransformer3DModel": Facts(aside=("context_embedder",)),
    "HunyuanVideoFramepackTransformer3DModel": Facts(
        aside=("context_embedder",),
        after=lambda call: call["image_embeds"].shape[1] + int(call["encoder_attention_mask"].sum()),
        sections=True,
    ),
    "HunyuanVideo15Transformer3DModel": Facts(pixels=1, aside=("context_embedder",)),
    "CogVideoXTransformer3DModel": Facts(dim=1, text_first=True),
    "ConsisIDTransformer3DModel": Facts(dim=1, text_first=True, aside=("perceiver_cross_attention.*",)),
    "MochiTransformer3DModel": Facts(),
    "SkyReelsV2Transformer3DModel": Facts(),
    "ChronoEditTransformer3DModel": Facts(),
    "WanVACETransformer3DModel": Facts(),
    "WanAnimateTransformer3DModel": Facts(aside=("face_adapter.*", "face_encoder")),
    "AnyFlowTransformer3DModel": Facts(dim=1),
    "HeliosTransformer3DModel": Facts(text_first=True, sections=True),
    "CosmosTransformer3DModel": Facts(),
    "Kandinsky5Transformer3DModel": Facts(dim=1, plane=(2, 3), aside=("text_transformer_blocks.*",)),
    "AllegroTransformer3DModel": Facts(),
    "LTX2VideoTransformer3DModel": Facts(plane=(), sound="audio_hidden_states"),
    "EasyAnimateTransformer3DModel": Facts(text_first=True),
}
PICTURE = Facts(plane=(3,), pixels=2)
TEXT_THEN_TOKENS = Facts(dim=1, plane=(), text_first=True)
TEXT_THEN_PICTURE = replace(PICTURE, text_first=True)
IMAGES = {
    **dict.fromkeys(
        ("ChromaTransformer2DModel", "OvisImageTransformer2DModel", "LongCatImageTransformer2DModel",
         "BriaTransformer2DModel", "BriaFiboTransformer2DModel"), TEXT_THEN_TOKENS,
    ),
    **dict.fromkeys(
        ("AuraFlowTransformer2DModel", "CogView3PlusTransformer2DModel", "GlmImageTransformer2DModel",
         "Lumina2Transformer2DModel"), TEXT_THEN_PICTURE,
    ),
    **dict.fromkeys(("DiTTransformer2DModel", "HiDreamImageTransformer2DModel", "HunyuanDiT2DModel"), PICTURE),
    "QwenImage21Transformer2DModel": TEXT_THEN_TOKENS,
    "Krea2Transformer2DModel": replace(TEXT_THEN_TOKENS, aside=("text_fusion",)),
    "ErnieImageTransformer2DModel": replace(PICTURE, pixels=1),
    "Ideogram4Transformer2DModel": replace(
        TEXT_THEN_TOKENS, room=lambda call: int((call["indicator"][0] != 2).sum())
    ),
    "HunyuanImageTransformer2DModel": replace(PICTURE, pixels=1, aside=("context_embedder",)),
    "SanaTransformer2DModel": replace(PICTURE, mixes=True),
    "PRXTransformer2DModel": replace(TEXT_THEN_PICTURE, joined=True),
}  # fmt: skip
FACTS = {**CLIPS, **IMAGES}
PACKED = ("FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel",
          "LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel")  # fmt: skip
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
        fresh: Sequence[int],
        exist: Sequence[int],
        begins: bool,
        after: int | None,
        pace: tuple[float, bool] | None = None,
        sound: int = 0,
        joined: bool = False,
        references: tuple[int, range, range] = (0, range(0), range(0)),
        text: tuple[int, int] = (0, 1),
        adapted: bool = False,
        prefix: range | None = None,
    ) -> None:
        super().__init__()
        self.prefix = prefix  # rows among the keys that no pass but the first computes: they are never old
        self.part_of_text = text  # which part of the text this pass refreshes, of how many
        self.text_grows = len(exist) < tokens  # as the picture's rows do, where no pass has computed all of them
        self.references = references  # how many rows follow the picture's, which are refreshed, and which there at all
        self.pace = pace  # how far the noise level has gone, whether it is the last one's
        self.table, self.tokens, self.fresh, self.exist = table, tokens, fresh, exist
        self.begins, self.after = begins, after  # riders that stand after the picture; all, if not said
        self.layer, self.idle, self.sound, self.joined = -1, False, sound, joined
        self.adapted = adapted  # whether layers attend once more, to the picture and an adapter's

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention or self.idle:
            return func(*args, **(kwargs or {}))
        named = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
        query, key, value = named.pop("query"), named.pop("key"), named.pop("value")
        if self.prefix is not None:
            return self._with_prefix(func, query, key, value, named)
        known = self.sound and key.shape[2] in (self.sound, self.tokens)
        if self.adapted and query.shape[2] == self.tokens < key.shape[2]:  # the picture, and then an adapter's
            return func(query, *self._with_adapter(key, value), **named)
        if query.shape[2] != key.shape[2] and not (known or self.joined):  # cross-attention: the text does not change
            return func(*args, **(kwargs or {}))
        self.layer += 1
        rows, seen = self._rows(key, value)
        if named.get("attn_mask") is not None:  # of keys, the same in every pass
            named["attn_mask"] = named["attn_mask"][..., seen]
        return func(query, *rows, **named)

    def _with_prefix(self, func: Any, query: Tensor, key: Tensor, value: Tensor, named: Any) -> Tensor:
        """Of a layer's calls the one that sees the picture; what comes before it sees none of it."""
        assert self.prefix is not None
        at, stop = self.prefix.start, self.prefix.stop
        if key.shape[2] < stop + self.tokens:
            return func(query, key, value, **named)
        self.layer += 1
        own = [torch.cat((rows[:, :, :at], rows[:, :, stop:]), 2) for rows in (key, value)]
        shown, _ = self._rows(*own)
        whole = [
            torch.cat((seen[:, :, :at], rows[:, :, at:stop], seen[:, :, at:]), 2)
            for seen, rows in zip(shown, (key, value), strict=True)
        ]
        return func(query, *whole, **named)

    def _with_adapter(self, *computed: Tensor) -> list[Tensor]:
        """Of the picture's rows what is known of them; an adapter's follow from the time alone and are never old."""
        self.layer += 1
        own, whole = zip(*(rows.split([self.tokens, rows.shape[2] - self.tokens], 2) for rows in computed), strict=True)
        shown, _ = self._rows(*own)
        return [torch.cat(pair, 2) for pair in zip(shown, whole, strict=True)]

    def _rows(self, *computed: Tensor) -> tuple[list[Tensor], list[int]]:
        blank = [torch.full_like(rows, torch.nan) for rows in computed]
        self.table.setdefault(self.layer, [History(one, torch.zeros_like(one), one.clone()) for one in blank])
        count, (others, fresh_others, others_there) = computed[0].shape[2], self.references
        image_at = 0 if self.after is None else count - self.tokens - others - self.after
        text = [row for row in range(count) if not 0 <= row - image_at < self.tokens + others]
        reference_at = image_at + self.tokens
        if self.sound and count == self.sound:  # of which the clip is no part
            text = list(range(count))
            return self._shown(computed, text if self.begins else [], text), text
        part, parts = self.part_of_text
        low, high = (min(part + at, parts) * (len(text) // parts) + min(part + at, len(text) % parts) for at in (0, 1))
        own, there = text[low:high], text[:high] if self.text_grows else text
        refreshed = [image_at + row for row in self.fresh] + own
        refreshed += [reference_at + row for row in fresh_others]
        others_seen = [reference_at + row for row in others_there]
        seen = sorted([image_at + row for row in self.exist] + there + others_seen)
        shown = self._shown(computed, refreshed, seen)
        return shown, seen

    def _shown(self, computed: Sequence[Tensor], refreshed: list[int], seen: list[int]) -> list[Tensor]:
        table = self.table[self.layer]
        for kept, rows in zip(table, computed, strict=True):
            self._refresh(kept, rows, refreshed)
        return [kept.shown[:, :, seen] for kept in table]

    def _refresh(self, kept: History, rows: Tensor, refreshed: list[int]) -> None:
        new = rows[:, :, refreshed]
        if self.pace is not None and self.begins:  # the first patch of a step, or all of it
            kept.shown = kept.true + self._worth(kept, new, refreshed) * kept.change
        if self.pace is not None:
            change = new - kept.true[:, :, refreshed]
            change = torch.where(change.isnan(), 0.0, change) + self.pace[1] * kept.change[:, :, refreshed]
            step = change.abs().amax(-1, keepdim=True) / 126
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
        text_patches: int = 1,
        streamed: Sequence[int] = (),
    ) -> None:
        self.streamed = streamed
        self.references, self.text_patches = references, text_patches
        self.forecast, self.times = forecast, [list[float]() for _ in range(branches)]
        self.names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.forward, self.patch_rows, self.warmup = model.forward, patch_rows, warmup
        self.__signature__ = inspect.signature(model.forward)  # modular pipelines read it
        kind = type(model).__name__
        self.packed, self.listed, self.text_first = kind in PACKED, kind in LISTED, kind in TEXT_FIRST
        self.facts = FACTS.get(kind)
        if self.facts is not None:
            self.text_first = self.facts.text_first
        self.level = float("inf")
        self.tables: list[Table] = [{} for _ in range(branches)]
        self.mixed: list[dict[Any, Any]] = [{} for _ in range(branches)]
        self.calls, self.adapted = 0, getattr(model, "image_proj", None) is not None
        self.apart: dict[tuple[int, ...], _Naive] = {}  # those whose calls leave out the same blocks
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if left_out := tuple(given.get("skip_layers") or ()):
            return self._leaving(left_out)._passes(given, args, kwargs)
        return self._passes(given, args, kwargs)

    def _leaving(self, blocks: tuple[int, ...]) -> _Naive:
        """What knows the keys and values of a branch whose calls leave out blocks: of other calls it knows nothing."""
        if blocks not in self.apart:
            self.apart[blocks] = branch = copy.copy(self)
            branch.calls, branch.tables, branch.mixed, branch.times = 0, [{}], [{}], [[]]
        return self.apart[blocks]

    def _passes(self, given: dict[str, Any], args: Any, kwargs: Any) -> Any:
        self._begin(given)
        step, branch = divmod(self.calls, len(self.tables))
        self.calls += 1
        if "hidden_states" in kwargs:
            args = (kwargs.pop("hidden_states"), *args)
        passes = self.streamed[step] if step < len(self.streamed) else 1
        for number in range(passes):
            result = self._over_patches(step, branch, given, args, kwargs, known=step + number > 0)
        return result

    def _over_patches(self, step: int, branch: int, given: dict[str, Any], args: Any, kwargs: Any, known: bool) -> Any:
        pace = self._pace(branch, given) if self.forecast else None
        latent = torch.stack(args[0]) if self.listed else args[0]
        dim = 1 if self.packed else 3 if self.listed else 2 if self.facts is None else self.facts.dim
        rows = sum(self.patch_rows)
        room = 0 if self.facts is None or self.facts.room is None else self.facts.room(given)
        prefix, ahead = _prefix(given)
        units = (latent.shape[dim] - self.references - room - ahead) // rows  # of the latent, per row of tokens
        assert units * rows == latent.shape[dim] - self.references - room - ahead
        tokens_per_row = units if self.packed else prod(size // 2 for size in latent.shape[dim + 1 :])
        if self.facts is not None:
            plane = prod(latent.shape[axis] for axis in self.facts.plane) // self.facts.pixels
            tokens_per_row = plane if self.facts.plane else units
        after = 0 if self.text_first else None
        if self.facts is not None and self.facts.after is not None:
            after = self.facts.after(given)
        extracts = given.get("kv_cache_mode") == "extract"
        patches = [rows] if step < self.warmup or extracts else list(self.patch_rows)
        results, start, second = [], 0, None
        for index, count in enumerate(patches):
            stop = start + count
            fresh = range(start * tokens_per_row, stop * tokens_per_row)
            exist = rows if known else stop  # no earlier step has computed the rest
            sizes = rows * tokens_per_row, fresh, range(exist * tokens_per_row)
            sound = 0 if self.facts is None or not self.facts.sound else given[self.facts.sound].shape[1]
            references = self.references, *_shares(self.references, index, len(patches), known=known)
            joined = self.facts is not None and self.facts.joined
            text = index, 1 if len(patches) == 1 else self.text_patches
            self.attention = _Pass(
                self.tables[branch], *sizes, index == 0, after, pace, sound, joined, references, text, self.adapted,
                prefix,
            )  # fmt: skip
            with self.attention, self._mixing(branch, fresh, tokens_per_row):
                result = self.forward(*args, **{**kwargs, "return_dict": False})
            cache = result[1] if extracts and len(result) > 1 else None
            second = result[1] if sound and index == 0 else second
            result = result[0] if isinstance(result, tuple) else result
            whole = torch.stack(result) if self.listed else result
            others = self.references if stop == rows else 0
            if prefix is not None:
                whole = whole[:, -units * rows :]
            first = room + start * units if start else 0
            results.append(whole.narrow(dim, first, room + stop * units + others - first))
            start = stop
        prediction = torch.cat(results, dim=dim)
        if second is not None or cache is not None:
            return prediction, cache if second is None else second
        if kwargs.get("return_dict", True):
            return Transformer2DModelOutput(sample=list(prediction) if self.listed else prediction)
        return (list(prediction) if self.listed else prediction,)

    def _mixing(self, branch: int, fresh: range, row: int) -> Any:
        """Where rows meet in sums and convolutions."""
        if self.facts is None or not self.facts.mixes:
            return nullcontext()
        bounds = list(itertools.accumulate(self.patch_rows, initial=0))
        spans = [range(low * row, high * row) for low, high in itertools.pairwise(bounds)]
        return _Mixing(self.mixed[branch], spans, fresh, row)

    def _begin(self, given: dict[str, Any]) -> None:
        """A clip in sections begins again from noise, with nothing known of its keys and values."""
        if self.facts is None or not self.facts.sections:
            return
        level = float(given["timestep"].max())
        if level > self.level:
            self.calls = 0
            for table, times in zip(self.tables, self.times, strict=True):
                table.clear()
                times.clear()
        self.level = level

    def _pace(self, branch: int, given: dict[str, Any]) -> tuple[float, bool]:
        """The step to this noise level, in steps that led to the last one, and whether it is that one."""
        time = next(given[name] for name in ("t", "timestep", "timesteps") if name in given)
        now, known = float(time.max()), self.times[branch]
        again = bool(known) and known[-1] == now
        ahead = (now - known[-1]) / (known[-1] - known[-2]) if len(known) > 1 else 0.0
        if not again:
            known.append(now)
        return min(max(ahead, 0.0), 4.0), again


def _prefix(given: dict[str, Any]) -> tuple[range | None, int]:
    """Where among the keys rows are that the first call alone computes, and how many of them its latent begins with."""
    if given.get("kv_cache_mode") is None:
        return None, 0
    if "img_mask" in given:
        *others, picture = map(prod, given["img_shapes"][0])
        return range(int(given["img_mask"][0].int().mul(3).add(1).sum()) - picture), sum(others)
    ahead, start = given.get("num_ref_tokens", 0), given["encoder_hidden_states"].shape[1]
    return range(start, start + (ahead or given["kv_cache"].num_ref_tokens)), ahead


def _aside(model: Any) -> list[Any]:
    facts, found = FACTS.get(type(model).__name__, Facts()), list(getattr(model, "context_refiner", ()))
    found += [model.image_proj] if getattr(model, "image_proj", None) is not None else []
    for path in facts.aside:
        part = model.get_submodule(path.removesuffix(".*"))
        found += list(part) if path.endswith(".*") else [part]
    return found


def _shares(total: int, index: int, parts: int, *, known: bool) -> tuple[range, range]:
    """Which of some rows a patch refreshes, and which there are by then: all, if an earlier step computed them."""
    low, high = (at * (total // parts) + min(at, total % parts) for at in (index, index + 1))
    return range(low, high), range(total if known else high)


@contextmanager
def naive_pipefusion(
    pipe: Any,
    patch_rows: Sequence[int],
    warmup: int,
    *,
    branches: int = 1,
    forecast: bool = False,
    references: int = 0,
    text_patches: int = 1,
    streamed: Sequence[int] = (),
) -> Iterator[None]:
    """While it lasts, a request of the pipeline runs as PipeFusion would.

    Args:
        pipe: A plain diffusers pipeline.
        patch_rows: Token rows of each patch.
        warmup: Calls per transformer and guidance branch that run the latent whole.
        branches: Guidance branches that the pipeline computes in calls of their own, one after the other.
        forecast: Whether stale rows are shown where they will be.
        references: Tokens of pictures that follow the one that is painted; each patch has as many of them.
        text_patches: Over how many of the first patches the text is spread.
        streamed: How often the patches of the first calls per transformer and guidance branch are run.
    """
    named = [part for name, part in pipe.components.items() if name.startswith(("transformer", "unconditional_"))]
    models = [part for part in named if part is not None]
    for model in models:
        model.forward = _Naive(model, patch_rows, warmup, branches, forecast, references, text_patches, streamed)
    try:
        yield
    finally:
        for model in models:
            del model.forward
            for part in _aside(model):
                del part.forward
