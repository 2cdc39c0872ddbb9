"""Parts of a pipeline that some ranks run for all: text encoders on their owners, the VAE on the output rank."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, NoReturn

from torch import nn

from patchpipe.config import ParallelConfig
from patchpipe.distributed.mesh import Group
from patchpipe.layout.text import HOST, LAYERS, ON_THE_LAST, SPREAD, from_the_last
from patchpipe.lazy.latent import materialise_tree
from patchpipe.loading.encoders.hosting import HostedEncoder
from patchpipe.loading.encoders.layers import Layers
from patchpipe.loading.encoders.passing import Prompts, mark_given, put_given
from patchpipe.pipeline.callbacks import Callbacks
from patchpipe.pipeline.modular.steps import SHARE, hook_steps, is_modular, with_bars
from patchpipe.recipes.adapters import encoders_of
from patchpipe.schedule.runner import Runner
from patchpipe.stage.stage import Stage
from patchpipe.tracing.recorder import span
from patchpipe.vae import spread_vae


class OutputElsewhere(BaseException):
    """Ends the pipeline on a rank that has nothing left to do: another one decodes."""


class Hooks:
    """What was changed, to be put back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute of an object itself, past what its class does when one is set."""
        had, previous = name in owner.__dict__, owner.__dict__.get(name)
        object.__setattr__(owner, name, value)
        self._undo.append(lambda: object.__setattr__(owner, name, previous) if had else object.__delattr__(owner, name))

    def undone_by(self, undo: Callable[[], Any]) -> None:
        """Notes what takes another change back."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Takes all changes back, the last one first."""
        while self._undo:
            self._undo.pop()()


def quieten(pipe: Any, hooks: Hooks) -> None:
    """One progress bar is enough."""
    for shows in with_bars(pipe):
        kept = dict(getattr(shows, "_progress_bar_config", {}))
        shows.set_progress_bar_config(**{**kept, "disable": True})
        hooks.undone_by(partial(shows.set_progress_bar_config, **kept))


def hook_transformer(stage: Stage, runner: Runner, methods: Mapping[str, Any], hooks: Hooks) -> None:
    """Has a transformer's calls run through the stages.

    Args:
        stage: This rank's part of it.
        runner: Runs its calls.
        methods: What else stands in for methods of it.
        hooks: Puts them back.
    """
    model: Any = stage.model
    forward: Any = partial(runner.forward, stage)
    forward.__signature__ = inspect.signature(model.forward)  # some pipelines pass on only what they find there
    hooks.set(model, "forward", forward)
    for name, method in methods.items():
        hooks.set(model, name, method)
    if hasattr(model, "cache_context"):
        original = model.cache_context
        hooks.set(model, "cache_context", lambda name, **options: runner.branch(name, original(name, **options)))


class Parts:
    """What stands in for methods of a pipeline's parts.

    Args:
        config: The layout.
        group: The ranks.
        runner: Runs the transformer's calls.
        callbacks: Tells what a user's callback asks for from the end of a request.
        before_decoding: Called when a latent is about to be decoded.
    """

    def __init__(
        self,
        config: ParallelConfig,
        group: Group,
        runner: Runner,
        callbacks: Callbacks,
        before_decoding: Callable[[], None],
    ) -> None:
        self._config, self._group, self._runner, self._callbacks = config, group, runner, callbacks
        self._before_decoding = before_decoding
        self._computing = False  # this rank alone, for all of them
        self._hooked: set[int] = set()  # VAEs
        self._prompts = Prompts()

    def hook_encoders(self, pipe: Any, hooks: Hooks) -> None:
        """Each text encoder, or each of its layers, runs on a rank of its own and gives all its result, if it is to."""
        for name, part in encoders_of(pipe).items():
            if self._config.text_rank == HOST and self._encodes(pipe):
                hooks.undone_by(self._hosted(name, part).attach())
            if not self._apart(pipe):
                continue
            if self._config.text_rank == SPREAD:
                hooks.set(part, "forward", self.on_owner(part.forward, self._config.encoder_rank(name), "text"))
                continue
            for layer, home in Layers.of(part).homes(self._text_ranks).items():
                module = part.get_submodule(layer)
                hooks.set(module, "forward", self._layer(module.forward, home))
            hooks.set(part, "generate", _generates_nothing)

    def _encodes(self, pipe: Any) -> bool:
        """Whether this rank runs the text encoders."""
        return self._group.rank == self._config.encoder_rank() or not (
            hasattr(pipe, "encode_prompt") or is_modular(pipe)
        )

    def _hosted(self, name: str, part: nn.Module) -> HostedEncoder:
        throttle = None if self._config.offload is None else self._config.offload.throttle
        return HostedEncoder(name, part, self._group.device, self._config.timeout, throttle)

    def _apart(self, pipe: Any) -> bool:
        """Whether each encoder, or its layers, has a rank; one by itself runs with what its pipeline's method does."""
        taken = inspect.signature(type(pipe).__init__).parameters
        several = sum(name.startswith("text_encoder") for name in taken) != 1 or not hasattr(pipe, "encode_prompt")
        return self._config.text_rank == LAYERS or (self._config.text_rank == SPREAD and several)

    @property
    def _text_ranks(self) -> list[int]:
        return from_the_last(self._config.world_size, self._config.output_rank)

    def _layer(self, run: Callable[..., Any], home: int) -> Callable[..., Any]:
        """A layer that one rank runs; of what it gives, what it was given is not sent."""
        shared = self.on_owner(lambda *args, **kwargs: mark_given(run(*args, **kwargs), (args, kwargs)), home, "text")

        @wraps(run)
        def layer(*args: Any, **kwargs: Any) -> Any:
            return put_given(shared(*args, **kwargs), (args, kwargs))

        return layer

    def hook_text(self, pipe: Any, hooks: Hooks) -> Callable[..., Any] | None:
        """One rank encodes a pipeline's text for all, by its method or in its steps.

        Returns:
            The method; ``None`` if there is none, or each text encoder has a rank of its own.
        """
        shared = not self._apart(pipe)
        if hasattr(pipe, "upsample_prompt") and self._group.world_size > 1:
            hooks.set(pipe, "upsample_prompt", _writes_nothing)
        if is_modular(pipe):
            for undo in hook_steps(pipe):
                hooks.undone_by(undo)
            if shared:
                hooks.set(pipe, SHARE, self.share_text)
        if not shared or not hasattr(pipe, "encode_prompt"):
            return None
        encode: Callable[..., Any] = pipe.encode_prompt
        hooks.set(pipe, "encode_prompt", self.share_prompts(encode))
        return encode

    def share_prompts(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """A pipeline's ``encode_prompt``, run on the rank of its text encoders for all."""
        comes_anew = self._config.text_rank in ON_THE_LAST
        return self.share_text(self._prompts.remembering(encode) if comes_anew else encode)

    def share_text(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """What encodes a pipeline's text, run on the rank of its text encoders for all."""
        return self.on_owner(encode, self._config.encoder_rank(), "text")

    def hook_vae(self, vae: nn.Module, hooks: Hooks, *, strips: bool = False) -> None:
        """Decoding on the output rank alone, or on all ranks in strips of rows; what is hooked already stays so."""
        if id(vae) in self._hooked:
            return
        if strips:
            hooks.undone_by(spread_vae(vae, self._group.rows(), gather_to=self._config.output_rank))
        else:
            encode: Any = vae.encode
            hooks.set(vae, "encode", self.on_owner(encode, self._config.output_rank, "vae"))
        decode: Any = vae.decode
        hooks.set(vae, "decode", self.decode(decode))
        self._hooked.add(id(vae))

    def on_owner(self, compute: Callable[..., Any], owner: int, carries: str) -> Callable[..., Any]:
        """Something that one rank computes, and all get.

        Args:
            compute: What to run there.
            owner: The rank.
            carries: What kind of thing it gives, for the timeline.
        """

        @wraps(compute)
        def shared(*args: Any, **kwargs: Any) -> Any:
            if self._computing:  # part of what the other ranks get as a whole
                return compute(*args, **kwargs)
            with span(self._group.recorder, "encode"), self._runner.points.passing():
                return self._group.share(owner, lambda: alone(*args, **kwargs), carries)

        def alone(*args: Any, **kwargs: Any) -> Any:
            self._computing = True
            try:
                return compute(*args, **kwargs)
            finally:
                self._computing = False

        return shared

    def decode(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        """Every rank gathers the latent at this point; only the output rank goes on."""

        def here(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = materialise_tree((args, kwargs), "vae.decode")
            self._before_decoding()
            if self._callbacks.running or self._runner.plan.sections:
                # the pipeline goes on afterwards, so every rank gets the picture
                with self._runner.points.passing("decodes the latent"):
                    self._runner.points.meet()
                    picture = decode(*args, **kwargs) if self._config.parallel_vae else None
                    return self._group.share(
                        self._config.output_rank, lambda: picture or decode(*args, **kwargs), "picture"
                    )
            if not self._group.output and not self._config.parallel_vae:
                raise OutputElsewhere
            with span(self._group.recorder, "decode"):
                picture = decode(*args, **kwargs)
            if not self._group.output:
                raise OutputElsewhere
            return picture

        return here


def _generates_nothing(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        'text_rank="layers" cannot write text, since no rank has the keys and values of all layers: give text_rank a '
        "rank, or leave out what writes prompts"
    )


def _writes_nothing(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "prompts are not rewritten on several ranks, since nothing tests it and one rank alone holds the text encoder: "
        "call upsample_prompt() on the pipeline before it is made parallel, and give the prompt it wrote"
    )
