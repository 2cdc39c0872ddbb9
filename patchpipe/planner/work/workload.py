"""What a request is for the cost model: the blocks of a model, and how often they run on how many tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from patchpipe.models import PLANS
from patchpipe.models.latent import Raster

Stream = Literal["image", "text", "both"]
Guidance = Literal["batch", "calls"]
AttentionKind = Literal["joint", "image", "cross"]


@dataclass(frozen=True)
class Matrix:
    """One Linear of a block.

    Attributes:
        inputs: Channels it takes.
        outputs: Channels it gives.
        stream: Whose tokens it serves; a single-stream block serves both at once.
        summed: Whether tensor parallelism splits it by rows, so that its results are summed over the ranks.
        split: Whether tensor parallelism splits it at all.
    """

    inputs: int
    outputs: int
    stream: Stream = "image"
    summed: bool = False
    split: bool = True


@dataclass(frozen=True)
class Attention:
    """One attention layer of a block.

    Attributes:
        kind: What its queries see: ``"joint"`` image and text, ``"image"`` the image alone, ``"cross"`` the text.
        width: Channels of all heads.
    """

    kind: AttentionKind
    width: int


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        name: Its kind, for people.
        width: Channels of a token.
        matrices: Its Linears that run per token; what runs once a call, such as modulation, is left out.
        attentions: Its attention layers.
        parameters: All its parameters.
    """

    name: str
    width: int
    matrices: tuple[Matrix, ...]
    attentions: tuple[Attention, ...]
    parameters: int

    @cached_property
    def separate_text(self) -> bool:
        """Whether text has matrices of its own, and so kernels of its own."""
        return any(matrix.stream == "text" for matrix in self.matrices)

    @cached_property
    def split_parameters(self) -> int:
        """Parameters that tensor parallelism splits."""
        return sum(matrix.inputs * matrix.outputs for matrix in self.matrices if matrix.split)

    @cached_property
    def self_attentions(self) -> int:
        """Attention layers whose keys come from the patch."""
        return sum(attention.kind != "cross" for attention in self.attentions)

    def multiply_adds(self, image: int, text: int, keys: int | None = None) -> float:
        """Multiply-adds for queries of so many tokens, attending to ``keys`` of the image and all of the text."""
        rows = {"image": image, "text": text, "both": image + text}
        seen = image if keys is None else keys
        total = float(sum(matrix.inputs * matrix.outputs * rows[matrix.stream] for matrix in self.matrices))
        for attention in self.attentions:
            queries, width = image + (text if attention.kind == "joint" else 0), attention.width
            total += 2 * queries * {"joint": seen + text, "image": seen, "cross": text}[attention.kind] * width
        return total


@dataclass(frozen=True)
class Workload:
    """A request of a model.

    Attributes:
        model: The model, as the user named it.
        blocks: Its blocks in running order.
        heads: Heads of its attention.
        rows: Token rows of the picture.
        text: Text tokens.
        joint: Whether the text takes part in self-attention; else it is attended to crosswise.
        branches: Guidance branches: 2 with guidance, else 1.
        guidance: Whether the branches are one batch or two calls a step.
        steps: Denoising steps.
        pictures: Pictures of the request.
        itemsize: Bytes of a parameter and of an activation.
        embedders: Parameters outside the blocks that every rank holds.
        components: Bytes of the text encoders and the VAE.
        height: Pixels.
        pixels: Pixels of a frame, which the VAE decodes at once.
        transformer: The diffusers class, if known.
        runnable: Whether patchpipe has a plan for the class.
        tensor: Whether the plan says how matrices split.
        transformers: How many of them a rank holds its part of.
    """

    model: str
    blocks: tuple[Block, ...]
    heads: int
    rows: Raster
    text: int
    joint: bool = True
    branches: int = 1
    guidance: Guidance = "batch"
    steps: int = 28
    pictures: int = 1
    itemsize: int = 2
    embedders: int = 0
    components: Mapping[str, int] = field(default_factory=dict)
    height: int = 0
    pixels: int = 0
    transformer: str = ""
    runnable: bool = True
    tensor: bool = True
    transformers: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "pictures", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.branches not in (1, 2):
            raise ValueError(f"branches={self.branches} must be 1, or 2 with guidance")
        if not self.blocks:
            raise ValueError(f"{self.model} has no blocks")

    @property
    def image(self) -> int:
        """Image tokens."""
        return self.rows.count * self.rows.tokens

    @property
    def joint_text(self) -> int:
        """Text tokens that are queries and keys like those of the image."""
        return self.text if self.joint else 0

    @property
    def spreads_text(self) -> bool:
        """Whether long text is spread over patches, as far as the class has a plan."""
        return any(plan.model == self.transformer and plan.spreads_text for plan in PLANS)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.blocks[0].width

    @property
    def batch(self) -> int:
        """Entries of the batch of a call."""
        return self.pictures * (self.branches if self.guidance == "batch" else 1)

    @property
    def calls(self) -> int:
        """Calls of the transformer in a step."""
        return self.branches if self.guidance == "calls" else 1

    @property
    def parameters(self) -> int:
        """Parameters of the transformer."""
        return sum(block.parameters for block in self.blocks) + self.embedders

    @cached_property
    def multiply_adds(self) -> float:
        """Multiply-adds of one step, all branches and pictures."""
        once = sum(block.multiply_adds(self.image, self.text) for block in self.blocks)
        return once * self.branches * self.pictures
