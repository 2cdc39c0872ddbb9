"""Inputs for a transformer's ``forward``, made by their names and fitted by trying."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from patchpipe.checking.loop import Call, Sample
from patchpipe.models.latent import SPACE, patch_sizes

# Tokens of the picture, or clip, and of the text: no two alike, so that shapes tell them apart.
GRID = {"f": 5, "h": 7, "w": 3}
TEXT, PADDED = 6, 2  # of which the last ones are padding
UNKNOWN = (
    37,
    41,
    43,
    47,
    53,
    59,
    61,
    67,
    71,
    73,
)  # channels that are not known yet, a number of its own for each input
TRIES = 14
LAYOUTS = ("bnc", "bchw", "bcfhw", "bfchw", "bfhwc", "bc1hw")
CLIPS = re.compile(r"3DModel$|Video")
FORMS = (  # what torch says of channels that do not fit: found, wanted
    (re.compile(r"\((\d+)x(\d+) and (\d+)x\d+\)"), (2, 3)),
    (re.compile(r"normalized_shape=\[(\d+)\].*size\s*\[.*?(\d+)\]"), (2, 1)),
    (re.compile(r"to have (\d+) channels, but got (\d+) channels"), (2, 1)),
    (re.compile(r"tensor a \((\d+)\) must match the size of tensor b \((\d+)\)"), (1, 2)),
)


class CannotMakeInputs(ValueError):
    """The inputs of a class are not known."""


@dataclass
class Making:
    """What inputs are made of.

    Attributes:
        model: The transformer.
        axes: A letter for each dim of the latent; see ``Latent``.
        grid: Tokens along each axis.
        dtype: What it computes in.
        seed: Of the values.
        channels: The channels of each input, as far as they are known.
    """

    model: nn.Module
    axes: str
    grid: Mapping[str, int]
    dtype: torch.dtype
    seed: int = 0
    channels: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of the latent."""
        found = 1
        for axis in SPACE:
            found *= self.grid.get(axis, 1)
        return found

    def wide(self, name: str) -> int:
        """Channels of an input: known, or a number to know it by."""
        return self.channels.setdefault(name, UNKNOWN[len(self.channels) % len(UNKNOWN)])

    def random(self, name: str, *shape: int) -> Tensor:
        """Values that only the input's name, the seed and the shape decide."""
        known = torch.Generator().manual_seed(self.seed * 1009 + sum(map(ord, name)))
        return torch.randn(*shape, generator=known, dtype=torch.float64).to(self.dtype)


def _latent(making: Making, name: str) -> Tensor:
    spans = {"f": 1, "h": 1, "w": 1}
    with contextlib.suppress(AttributeError, TypeError):  # else of one pixel each
        spans |= patch_sizes(making.model.config)
    sizes = {"b": 1, "n": making.tokens, "1": 1, "c": making.wide(name)}
    sizes |= {axis: making.grid.get(axis, 1) * spans[axis] for axis in SPACE}
    return making.random(name, *(sizes[axis] for axis in making.axes))


def _text(making: Making, name: str) -> Tensor:
    return making.random(name, 1, TEXT, making.wide(name))


def _pooled(making: Making, name: str) -> Tensor:
    return making.random(name, 1, making.wide(name))


def _mask(_: Making, __: str) -> Tensor:
    return (torch.arange(TEXT) < TEXT - PADDED).long()[None]


def _time(making: Making, _: str) -> Tensor:
    return torch.full((1,), 0.5, dtype=making.dtype)


def _places(making: Making) -> Tensor:
    """A position for each token, time first; rows and columns are those that image models number."""
    axes = next((len(getattr(making.model.config, name)) for name in ("axes_dims_rope", "axes_dim", "axes_dims")
                 if getattr(making.model.config, name, None)), 3)  # fmt: skip
    found = torch.zeros(making.grid["h"], making.grid["w"], axes)
    found[..., 1] = torch.arange(making.grid["h"])[:, None]
    found[..., 2] = torch.arange(making.grid["w"])
    return found.reshape(making.tokens, axes)


def _text_places(making: Making, _: str = "") -> Tensor:
    return torch.zeros(TEXT, _places(making).shape[1])


def _pairs(making: Making, _: str) -> Tensor:
    return torch.tensor([[64.0, 48.0]], dtype=making.dtype)


def _given_sizes(name: str) -> Callable[[Making, str], int]:
    return lambda making, _: making.grid.get(name, 1)


MAKERS: dict[str, Callable[[Making, str], Any]] = {
    **dict.fromkeys(("hidden_states", "x"), _latent),
    **dict.fromkeys(
        ("encoder_hidden_states", "encoder_hidden_states_t5", "encoder_hidden_states_2", "text_bth"), _text
    ),
    **dict.fromkeys(("pooled_projections", "pooled_embeds"), _pooled),
    **dict.fromkeys(("timestep", "timesteps", "t", "r_timestep"), _time),
    **dict.fromkeys(("encoder_attention_mask", "encoder_hidden_states_mask", "text_embedding_mask"), _mask),
    **dict.fromkeys(("text_embedding_mask_t5", "encoder_attention_mask_2"), _mask),
    **dict.fromkeys(("original_size", "target_size", "crop_coords"), _pairs),
    "cap_feats": lambda making, name: [_text(making, name)[0]],
    "guidance": lambda making, _: torch.full((1,), 3.0, dtype=making.dtype),
    "img_ids": lambda making, _: _places(making),
    "txt_ids": _text_places,
    "position_ids": lambda making, _: torch.cat([_text_places(making), _places(making)]),
    "img_shapes": lambda making, _: [[(1, making.grid["h"], making.grid["w"])]],
    "num_frames": _given_sizes("f"),
    "height": _given_sizes("h"),
    "width": _given_sizes("w"),
    "class_labels": lambda *_: torch.tensor([3]),
    "text_lens": lambda *_: torch.tensor([TEXT - PADDED]),
    "prior_token_id": lambda making, _: torch.arange(making.tokens)[None] % 16,
    "prior_token_drop": lambda *_: torch.tensor([False]),
    "added_cond_kwargs": lambda making, name: {
        "resolution": _pairs(making, name),
        "aspect_ratio": _pairs(making, name)[:, :1] / 64,
    },
    "visual_rope_pos": lambda making, _: [torch.arange(making.grid.get(axis, 1)) for axis in SPACE],
    "text_rope_pos": lambda *_: torch.arange(TEXT),
    "scale_factor": lambda *_: (1.0, 1.0, 1.0),
    "enable_diffusion_forcing": lambda *_: False,
    "text_encoder_layers": lambda making, name: [_text(making, name) for _ in range(2 * 3)],
}
ONLY_IF = {"guidance": "guidance_embeds"}  # inputs that a field of the configuration asks for


def fitted(
    model: nn.Module, dtype: torch.dtype, layouts: Sequence[str] = (), wanted: Sequence[str] = ()
) -> tuple[Sample, str]:
    """A call of a transformer that runs, and the axes of its latent.

    Channels, and the latent's layout where it is not known, are found by trying: torch says what did not fit.

    Args:
        model: The transformer.
        dtype: What it computes in.
        layouts: Axes of its latent to try; by default all there are.
        wanted: Inputs beside the latent to give, where it is known which ones pipelines give; by default all.

    Raises:
        CannotMakeInputs: It has inputs that are not known, or no layout fits.
    """
    names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
    names = [name for at, name in enumerate(names) if at == 0 or not wanted or name in wanted]
    parameters = inspect.signature(type(model).forward).parameters
    unknown = [name for name in names if parameters[name].default is inspect.Parameter.empty and name not in MAKERS]
    if unknown:
        raise CannotMakeInputs(
            f"{type(model).__name__} must be given {', '.join(unknown)}, which cannot be made from the name "
            f"alone: give a folder with a whole pipeline of it, and the pipeline makes them"
        )
    said = []
    for axes in layouts or _likely(model):
        grid = GRID if "f" in axes or (axes == "bnc" and "num_frames" in names) else {**GRID, "f": 1}
        for sizes in (grid, {**grid, "w": grid["h"]}):  # some take squares alone
            making = Making(model, axes, sizes, dtype)
            problem = _fit(making, names)
            if problem is None:
                return sample_of(making, names), axes
        said.append(f"{axes}: {problem}")
    raise CannotMakeInputs(
        f"no inputs were found that {type(model).__name__} takes; give a folder with a whole pipeline of it, and the "
        f"pipeline makes them. Layouts of the latent that were tried: {'; '.join(said)}"
    )


def _likely(model: nn.Module) -> list[str]:
    clips = bool(CLIPS.search(type(model).__name__))
    return sorted(LAYOUTS, key=lambda axes: (("f" in axes) != clips) and axes != "bnc")  # a stable order


def _fit(making: Making, names: Sequence[str]) -> str | None:
    """Tries until the channels fit; what is still wrong at last."""
    problem = ""
    for _ in range(TRIES):
        sample = sample_of(making, names)
        try:
            with torch.no_grad():
                given = sample.latents[0]
                result = making.model(**sample.inputs(0, given), return_dict=False)[0]
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            if not _learn(making, problem):
                return problem.splitlines()[0][:160]
            continue
        made = result[0][None] if isinstance(result, (list, tuple)) else result
        dims = [at for at, axis in enumerate(making.axes) if axis != "c"]
        if made.ndim == given.ndim and all(made.shape[at] == given.shape[at] for at in dims):
            return None
        return f"predicts {tuple(made.shape)} of {tuple(given.shape)}"
    return problem.splitlines()[0][:160]


def _learn(making: Making, problem: str) -> bool:
    """Takes the channels that an input should have had from an error."""
    for form, (found, wanted) in FORMS:
        match = form.search(problem)
        if match is None:
            continue
        had, needed = int(match[found]), int(match[wanted])
        for name, channels in making.channels.items():
            pixels = had // channels  # of a token, where their channels are put together first
            if channels in UNKNOWN and had == pixels * channels and needed % pixels == 0:
                making.channels[name] = needed // pixels
                return True
    return False


def sample_of(making: Making, names: Sequence[str]) -> Sample:
    """Two calls, one for each branch of guidance: alike but for the text."""
    latent = names[0]
    config: Any = making.model.config
    wanted = [name for name in names if name in MAKERS and getattr(config, ONLY_IF.get(name, ""), True)]
    inputs = {name: MAKERS[name](making, name) for name in wanted}
    given = inputs.pop(latent)
    listed = latent == "x"
    second = Making(making.model, making.axes, making.grid, making.dtype, making.seed + 1, making.channels)
    other = {name: MAKERS[name](second, name) for name in inputs}
    time = next((name for name in ("timestep", "timesteps", "t") if name in inputs), None)
    return Sample(latent, time, (Call("cond", inputs), Call("uncond", other)), (given, given), listed=listed)
