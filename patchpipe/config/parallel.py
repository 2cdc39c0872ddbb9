"""One frozen, validated description of the parallel layout."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patchpipe.config.describing import describe
from patchpipe.config.holdings import holdings
from patchpipe.config.warmup import (
    ALL_STEPS,
    STREAMED,
    WATCHED,
    WarmupKind,
    check_warmup,
    passes,
    synchronous_steps,
)
from patchpipe.layout.axes import DEGREES
from patchpipe.layout.checks import check_at_least, check_patch_rows, check_rank, check_stage_blocks, plain_numbers
from patchpipe.layout.combinations import check_combination, check_compiled, check_offloaded, check_watched
from patchpipe.layout.domains import check_changed_tokens, check_compressed, check_levels, check_values_first
from patchpipe.layout.offloading import OffloadConfig
from patchpipe.layout.patching import PatchCosts, quickest
from patchpipe.layout.text import WAYS, WAYS_TOLD, TextRank, encoder_rank
from patchpipe.layout.words import describe_ranks

if TYPE_CHECKING:
    from patchpipe.planner.machine.profiles import Profile

Backend = Literal["auto", "nccl", "gloo"]


@dataclass(frozen=True)
class ParallelConfig:
    """How one pipeline is spread over devices.

    Args:
        pipefusion: Number of pipeline stages N. Each device holds about 1/N of the blocks.
        patches: Number of patches M the latent is cut into. ``None`` takes the number that makes a request the
            shortest (see ``patchpipe.layout.patching.quickest``). More patches than stages hide the hops between
            stages; fewer patches are cheaper to compute. Each patch keeps at least one row per rank.
        split_batch: Whether a batch goes through the stages in halves, if its number of entries is even, as with both
            branches of guidance. Then half as many patches keep the stages busy, and they see fresher keys. Blocks
            that do not divide by the stages are evened out between the halves. Each patch costs as much as two.
            ``None`` does so if it evens out the stages.
        share_blocks: Whether two neighbouring stages may both hold the block between them. Each runs it for some of the
            patches, so that stages take equally long if blocks do not divide by them. The picture is the same. Fresh
            keys and values of such blocks are sent to the other stage. ``None`` does so if a step gets at least 3 %
            shorter and ``split_batch`` does not already even out the stages.
        warmup: Synchronous steps W before patches stream across step boundaries, counted per guidance branch in calls
            of the transformer. ``"all"`` makes every step synchronous; the picture is then bit-equal to one device.
            ``"streamed"`` uses no synchronous step, so no stage waits: the patches of the first step stream three
            times, each time beside the keys and values of the time before; with guidance, those of the next three
            steps stream twice. ``"auto"`` goes by the forecast's own error: a synchronous step follows one in which
            keys and values did not go on as before. ``None`` is 1, and 2 with a forecast and guidance, which
            amplifies the error of the first stale step.
        forecast: Whether stale rows are corrected: the last change of a row is continued, in proportion to that of
            the noise level. The picture is much closer to one device's. Needs half as much memory again for keys and
            values in 16 bits. ``None`` does so for every class that a test has run it with.
        patch_rows: Token rows of each patch, for uneven cuts. ``None`` cuts patches so that all cost the same.
        text_patches: Over how many of the first patches the text is spread. ``None`` takes one. If the text is long
            beside the picture and the model's plan allows it, ``None`` takes as many as it needs until no patch takes
            much longer than another.
        stage_blocks: Blocks of each stage. ``None`` balances the stages by counted cost. In ``(3.5, 3.5)`` both stages
            hold the fourth block, and each runs it for half of the patches.
        output_rank: The rank that holds the VAE and gets the images.
        text_rank: The rank that holds the text encoders and encodes prompts for all. ``None`` takes the last rank;
            ``"spread"`` puts each encoder on its own rank, as far as there are ranks; ``"layers"`` puts the layers of
            each on all. With ``"host"`` the last rank has them in host memory, and layers come to its device while they
            run; with ``"disk"`` it reads them layer by layer for every new prompt and keeps none.
        data: Number of parts of the batch. Each part has its own ranks.
        cfg: Guidance branches that run side by side: with 2, each branch has its own ranks.
        idle_branch: Whether ``cfg=2`` also takes requests without guidance. Their only branch then runs on half of the
            ranks while the others wait. ``False`` refuses them, since they would be faster with ``cfg=1``.
        ulysses: Ranks that share every stage by splitting each patch's tokens, and in attention the heads
            (DeepSpeed-Ulysses, arXiv 2309.14509).
        ulysses_inner: How many of these ranks reach each other over fast links, where those between such domains are
            slow: the ranks of a host, say. Each then exchanges across domains with one rank of each, and inside its
            domain what came (CoCoDiff, arXiv 2604.14561). Neighbours in rank number share a domain. The picture is the
            same. 1 makes no difference between links.
        values_first: Whether values are exchanged as soon as they are projected, while queries and keys are still
            being computed. The picture is the same.
        changed_tokens: Share of tokens that ``ulysses`` exchanges after the warm-up: in each layer those whose values
            have changed most (CoCoDiff, arXiv 2604.14561). Others keep what they have of the rest; with ``forecast``
            they continue its last change. The picture is no longer that of one device. The share is a mean: more tokens
            go at the beginning, fewer at the end. ``None`` exchanges all.
        compress: ``"int8"`` sends changes since the last step, in eight bits, from stage to stage and in the gathers of
            ``distrifusion`` (CompactFusion, arXiv 2507.17511). The picture then depends on the number of stages too.
        ring: Ranks that share every stage by splitting each patch's tokens and pass keys and values around
            (Ring Attention, arXiv 2310.01889).
        tensor: Ranks that share every stage by splitting its matrices (Megatron-LM, arXiv 1909.08053).
        distrifusion: Ranks that hold the whole model and a part of the latent each, and see the others' keys
            and values one step late (DistriFusion, arXiv 2402.19481); instead of ``pipefusion``.
        parallel_vae: Decode and encode pictures in strips of rows, one strip per rank. Every rank then holds the VAE.
            Decoding takes about 1/N of the memory; the picture is the same up to float tolerance.
        compile: Compile the blocks of each rank with ``torch.compile``, each kind of block once for all shapes. The
            first request takes longer. Results agree with eager ones to float tolerance.
        offload: Keep weights of the blocks in host memory, and copy them in chunks while other blocks compute. An
            ``OffloadConfig``, or ``"auto"``. The picture is the same.
        backend: ``"nccl"``, ``"gloo"`` or ``"auto"``. gloo copies CUDA tensors through the host, so ranks can share a
            device. ``"auto"`` takes NCCL if every rank has its own CUDA device, else gloo.
        timeout: Most seconds that any wait for another rank may last.

    Raises:
        ValueError: A field is out of range or two fields contradict each other.
    """

    pipefusion: int = 1
    patches: int | None = None
    split_batch: bool | None = None
    share_blocks: bool | None = None
    warmup: WarmupKind | None = None
    forecast: bool | None = None
    patch_rows: tuple[int, ...] | None = None
    text_patches: int | None = None
    stage_blocks: tuple[float, ...] | None = None
    output_rank: int = 0
    text_rank: TextRank = None
    data: int = 1
    cfg: int = 1
    idle_branch: bool = False
    ulysses: int = 1
    ulysses_inner: int = 1
    values_first: bool = False
    changed_tokens: float | None = None
    compress: Literal["int8"] | None = None
    ring: int = 1
    tensor: int = 1
    distrifusion: int = 1
    parallel_vae: bool = False
    compile: bool = False
    offload: OffloadConfig | None = None
    backend: Backend = "auto"
    timeout: float = 300.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "offload", OffloadConfig.of(self.offload))
        for one in dataclasses.fields(self):
            object.__setattr__(self, one.name, plain_numbers(getattr(self, one.name)))
        for name in DEGREES:
            check_at_least(name, getattr(self, name), 1)
        if self.cfg > 2:
            raise ValueError(f"cfg={self.cfg} must be 1 or 2: there are two guidance branches")
        check_combination(self.methods)
        if self.distrifusion > 1 and (self.pipefusion > 1 or self.patches not in (None, 1) or self.patch_rows):
            raise ValueError(
                "distrifusion gives every rank one part of the latent and the whole model: it cannot be combined "
                "with pipefusion, patches or patch_rows"
            )
        for name in ("split_batch", "share_blocks", "forecast"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} must be True, False or None")
            if value and self.distrifusion > 1 and name != "forecast":
                raise ValueError(f"{name}=True is for patches that stream; distrifusion has none: leave it out")
        check_levels(self.ulysses, self.ulysses_inner)
        for name in ("compile", "idle_branch", "values_first"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        if self.values_first:
            check_values_first(self.ulysses, self.compile)
        if self.changed_tokens is not None:
            names = ("patch_rows", "values_first", "compile", "split_batch", "share_blocks")
            others = [name for name in names if getattr(self, name)]
            others += [name for name in ("patches", "text_patches") if getattr(self, name) not in (None, 1)]
            others += [f"warmup={self.warmup!r}"] if self.warmup in (0, STREAMED, WATCHED) else []
            check_changed_tokens(self.changed_tokens, self.methods, others)
        if self.compress is not None:
            others = [f"warmup={self.warmup!r}"] if self.warmup in (STREAMED, WATCHED) else []
            check_compressed(
                self.compress, self.methods, [*others, *(["compile"] if self.compile else [])], self.synchronous
            )
        if self.compile:
            check_compiled(frozenset(name for name in DEGREES if getattr(self, name) > 1))
        if self.offload is not None:
            asked, sharing = self.offload, self.ulysses * self.ring
            check_offloaded(self.tensor, self.compile, asked.tier, asked.gathered, sharing)
        if self.patches is not None:
            check_at_least("patches", self.patches, 1)
        check_warmup(self.warmup)
        if self.warmup == WATCHED:
            check_watched(self.methods, self.compile, self.forecast is not False)
        if self.warmup == STREAMED and self.distrifusion > 1:
            raise ValueError(f'warmup="{self.warmup}" is for patches that stream; distrifusion has none: use warmup=1')
        if self.text_patches is not None:
            check_at_least("text_patches", self.text_patches, 1)
            if self.text_patches > 1 and self.distrifusion > 1:
                raise ValueError("text_patches is for patches that stream; distrifusion has none: leave it out")
        self._freeze("patch_rows")
        self._freeze("stage_blocks")
        if self.share_blocks:
            self._check_share_blocks("share_blocks=True")
            if self.stage_blocks is not None:
                raise ValueError(
                    f"share_blocks=True and stage_blocks={self.stage_blocks} exclude each other: leave one out, "
                    f"or give stage_blocks fractions"
                )
        if self.patch_rows is not None:
            check_patch_rows(self.patch_rows, self.patches)
        if self.stage_blocks is not None:
            check_stage_blocks(self.stage_blocks, self.pipefusion)
            if any(n % 1 for n in self.stage_blocks):
                self._check_share_blocks(f"stage_blocks={self.stage_blocks}")
        check_rank("output_rank", self.output_rank, self.world_size)
        if self.text_rank not in (None, *WAYS):
            check_rank("text_rank", self.text_rank, self.world_size, f"; or say {WAYS_TOLD}")
        if self.backend not in ("auto", "nccl", "gloo"):
            raise ValueError(f"backend={self.backend!r} is unknown: use 'auto', 'nccl' or 'gloo'")
        if not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout!r} must be a positive number of seconds")

    @classmethod
    def auto(
        cls,
        model: str | Path,
        devices: int,
        *,
        device: str | None = None,
        link: str | None = None,
        profile: Profile | str | Path | None = None,
        exact: bool = False,
        memory: float | None = None,
        warmup: WarmupKind | None = None,
        compile: bool = False,
        **asked: Any,
    ) -> ParallelConfig:
        """The layout that the planner predicts to be fastest.

        Args:
            model: A known name such as ``"flux.1-dev"``, a folder or a hub id.
            devices: Ranks.
            device: A known card such as ``"l40"``.
            link: A known link such as ``"pcie4"``.
            profile: A profile or its file, as ``patchpipe profile`` writes it, instead of ``device`` and ``link``.
            exact: Only methods whose picture is that of one device, up to the order of sums.
            memory: GiB a device may hold; ``None`` takes all it has.
            warmup: Synchronous steps.
            compile: Whether blocks are compiled.
            **asked: The request: ``height``, ``width``, ``steps``, ``guidance``, ``pictures``, ``text_tokens``,
                ``dtype``; see ``patchpipe.planner.work.named.Asked``.

        Raises:
            ValueError: A name is unknown, or no layout fits.
            FileNotFoundError: There is no such model or profile.
        """
        from patchpipe.planner.choosing import best_config

        bytes_each = None if memory is None else int(memory * 2**30)
        wishes = {"exact": exact, "memory": bytes_each, "warmup": warmup, "compile": compile}
        return best_config(model, devices, device, link, profile, wishes, asked)

    @property
    def methods(self) -> frozenset[str]:
        """The methods in use."""
        return frozenset(name for name in DEGREES if getattr(self, name) > 1)

    @property
    def world_size(self) -> int:
        """Number of ranks the layout needs."""
        return prod(self.mesh_shape)

    @property
    def mesh_shape(self) -> tuple[int, ...]:
        """Sizes of the axes ``data × cfg × pipe × displaced × ring × ulysses × tensor``."""
        return (self.data, self.cfg, self.pipefusion, self.distrifusion, self.ring, self.ulysses, self.tensor)

    def encoder_rank(self, encoder: str = "text_encoder") -> int:
        """The rank that holds a text encoder, ``"text_encoder"``, ``"text_encoder_2"`` and so on."""
        return encoder_rank(self.text_rank, encoder, self.world_size, self.output_rank)

    @property
    def synchronous(self) -> bool:
        """Whether every step is a warm-up step, so that no key or value is ever stale."""
        return self.warmup == ALL_STEPS

    @property
    def stale(self) -> bool:
        """Whether keys and values of a step before are seen, if the picture has rows for more than one patch."""
        patches = self.patches if self.patch_rows is None else len(self.patch_rows)
        streams = self.pipefusion > 1 if patches is None else patches > 1
        return not self.synchronous and (streams or self.distrifusion > 1 or self.changed_tokens is not None)

    @property
    def forecasts(self) -> bool:
        """Whether there are stale rows, and they are corrected."""
        return self.stale and self.forecast is not False

    def warmup_steps(self, *, guided: bool) -> int:
        """Synchronous steps before patches stream, if ever they do.

        Args:
            guided: Whether the request has two guidance branches.
        """
        return synchronous_steps(self.warmup, guided=guided, forecast=self.forecasts)

    def passes(self, call: int, *, guided: bool) -> int:
        """How often the patches of a call that streams go through the stages.

        Args:
            call: The call's number in its guidance branch, from 0.
            guided: Whether the request has two guidance branches.
        """
        return passes(self.warmup, call, guided=guided)

    @property
    def may_share(self) -> bool | None:
        """Whether neighbouring stages may share a block by patches; ``None`` where it makes stages enough cheaper."""
        streams = self.pipefusion > 1 and self.warmup not in (0, ALL_STEPS, STREAMED) and self.patches != 1
        return self.share_blocks if streams and self.stage_blocks is None and not self.split_batch else False

    def patches_for(self, rows: int, tokens: int, costs: PatchCosts, halves: int = 1) -> int:
        """Number of patches for a picture of ``rows`` token rows and ``tokens`` tokens in all.

        Args:
            rows: Token rows.
            tokens: Tokens, of image and text.
            costs: What a patch costs beside its tokens.
            halves: 2 where the batch goes through the stages in halves, so that there are two of every patch.

        Raises:
            ValueError: More patches were asked for than there are rows.
        """
        if self.patch_rows is not None:
            return len(self.patch_rows)
        if self.patches is None:
            wanted = quickest(self.pipefusion, tokens / (self.ulysses * self.ring), costs, halves)
            return max(1, min(rows // (self.ulysses * self.ring), wanted))
        if self.patches > rows:
            raise ValueError(
                f"patches={self.patches} is more than the {rows} token rows of this picture: "
                f"use patches={rows} or fewer, or a taller picture"
            )
        return self.patches

    def describe(self) -> str:
        """One line for people: the layout used."""
        return describe(self)

    def __str__(self) -> str:
        """The mesh, and what each rank holds."""
        holdings = [self.holdings(rank) for rank in range(self.world_size)]
        return describe_ranks(
            self.describe(), self.mesh_shape, holdings, share=self.may_share, inner=self.ulysses_inner
        )

    def holdings(self, rank: int) -> str:
        """What a rank holds, in words."""
        return holdings(self, rank)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain data; ``ParallelConfig(**config.as_dict())`` is equal to ``config``."""
        return dataclasses.asdict(self)

    def _freeze(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None:
            object.__setattr__(self, name, tuple(value))

    def _check_share_blocks(self, asked: str) -> None:
        if self.split_batch:
            raise ValueError(f"{asked} shares blocks by patches, split_batch=True by halves: leave one of them out")
        if self.warmup in (0, STREAMED):
            raise ValueError(f"{asked} needs a synchronous step to begin with: use warmup=1 or more")
