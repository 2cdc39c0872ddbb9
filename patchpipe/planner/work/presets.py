"""Models everybody knows, as workloads: plannable without a download, from the figures of their configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from patchpipe.models import PLANS
from patchpipe.models.latent import Raster
from patchpipe.planner.work.workload import Attention, Block, Guidance, Matrix, Workload

PIXELS_PER_TOKEN = 16  # eight of the autoencoder, two of the patch embedding
FRAMES_PER_TOKEN = 4
GB = 10**9
T5_XXL = 9.52  # GB in 16 bit


def dual(width: int, *, attention2: bool = False) -> Block:
    """A dual-stream block (MMDiT): image and text have matrices of their own, and attend jointly."""
    matrices: list[Matrix] = []
    for stream in ("image", "text"):
        matrices += [Matrix(width, width, stream) for _ in range(3)]  # type: ignore[arg-type]
        matrices.append(Matrix(width, width, stream, summed=True))  # type: ignore[arg-type]
        matrices += _feed_forward(width, stream)
    attentions = [Attention("joint", width)]
    modulations = 12
    if attention2:
        matrices += [Matrix(width, width) for _ in range(3)] + [Matrix(width, width, summed=True)]
        attentions.append(Attention("image", width))
        modulations += 3
    parameters = sum(m.inputs * m.outputs for m in matrices) + modulations * width**2
    return Block("dual-stream", width, tuple(matrices), tuple(attentions), parameters)


def single(width: int) -> Block:
    """A single-stream block: one set of matrices for image and text, feed-forward beside the attention."""
    both = (
        *(Matrix(width, width, "both") for _ in range(3)),
        Matrix(width, 4 * width, "both"),
        Matrix(5 * width, width, "both", summed=True),
    )
    parameters = sum(m.inputs * m.outputs for m in both) + 3 * width**2
    return Block("single-stream", width, both, (Attention("joint", width),), parameters)


def crossed(width: int, *, feed_forward: int | None = None, skip: bool = False) -> Block:
    """A block of self-attention on the image and cross-attention to text, whose keys are made once a request."""
    hidden = feed_forward or 4 * width
    attention = (*(Matrix(width, width) for _ in range(3)), Matrix(width, width, summed=True))
    cross = (Matrix(width, width), Matrix(width, width, summed=True))
    skipped = (Matrix(2 * width, width, split=False),) if skip else ()
    matrices = (*skipped, *attention, *cross, Matrix(width, hidden), Matrix(hidden, width, summed=True))
    parameters = sum(m.inputs * m.outputs for m in matrices) + 2 * width**2
    return Block("self and cross", width, matrices, (Attention("image", width), Attention("cross", width)), parameters)


def shared(width: int) -> Block:
    """A block whose matrices serve image and text alike (CogVideoX)."""
    matrices = (
        *(Matrix(width, width, "both") for _ in range(3)),
        Matrix(width, width, "both", summed=True),
        *_feed_forward(width, "both"),
    )
    parameters = sum(m.inputs * m.outputs for m in matrices) + 12 * 512 * width
    return Block("shared-stream", width, matrices, (Attention("joint", width),), parameters)


def _feed_forward(width: int, stream: str) -> list[Matrix]:
    return [Matrix(width, 4 * width, stream), Matrix(4 * width, width, stream, summed=True)]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Preset:
    """A known model.

    Attributes:
        name: Its name.
        hub: Its hub id.
        transformer: The diffusers class.
        blocks: Makes its blocks.
        heads: Heads of its attention.
        text: Text tokens as its pipeline pads or cuts them.
        steps: Usual steps.
        joint: Whether text takes part in self-attention.
        guided: Whether its pipeline guides by two branches as a rule.
        guidance: Whether the branches are one batch or two calls.
        embedders: Parameters outside the blocks.
        components: Gigabytes of text encoders and VAE in 16 bit.
        frames: Frames of a video.
    """

    name: str
    hub: str
    transformer: str
    blocks: Callable[[], tuple[Block, ...]]
    heads: int
    text: int
    steps: int
    joint: bool = True
    guided: bool = True
    guidance: Guidance = "batch"
    embedders: int = 0
    components: Mapping[str, float] = field(default_factory=dict)
    frames: int = 1

    @property
    def runnable(self) -> bool:
        """Whether patchpipe has a plan for the class."""
        return any(plan.model == self.transformer for plan in PLANS)

    def rows(self, height: int, width: int, frames: int | None = None) -> Raster:
        """Token rows: those of one frame after those of another.

        Raises:
            ValueError: The sizes are no multiples of a token's.
        """
        if height % PIXELS_PER_TOKEN or width % PIXELS_PER_TOKEN:
            raise ValueError(
                f"{height}×{width} pixels are no multiple of the {PIXELS_PER_TOKEN} that make a token of {self.name}"
            )
        latents = ((frames or self.frames) - 1) // FRAMES_PER_TOKEN + 1
        return Raster(height // PIXELS_PER_TOKEN * latents, width // PIXELS_PER_TOKEN, 1)

    def workload(
        self,
        height: int,
        width: int,
        *,
        steps: int | None = None,
        frames: int | None = None,
        guidance: bool | None = None,
        pictures: int = 1,
    ) -> Workload:
        """The request: sizes in pixels; what is ``None`` is as usual for the model."""
        return Workload(
            model=self.name,
            blocks=self.blocks(),
            heads=self.heads,
            rows=self.rows(height, width, frames),
            text=self.text,
            joint=self.joint,
            branches=2 if (self.guided if guidance is None else guidance) else 1,
            guidance=self.guidance,
            steps=steps or self.steps,
            pictures=pictures,
            embedders=self.embedders,
            components={part: int(size * GB) for part, size in self.components.items()},
            height=height,
            pixels=height * width,
            transformer=self.transformer,
            runnable=self.runnable,
        )


def _flux() -> tuple[Block, ...]:
    return (dual(3072),) * 19 + (single(3072),) * 38


def _hunyuan_video() -> tuple[Block, ...]:
    return (dual(3072),) * 20 + (single(3072),) * 40


def _hunyuan_dit() -> tuple[Block, ...]:
    hidden = int(1408 * 4.3637)
    return (crossed(1408, feed_forward=hidden),) * 21 + (crossed(1408, feed_forward=hidden, skip=True),) * 19


_FLUX_PARTS = {"text_encoder": 0.25, "text_encoder_2": T5_XXL, "vae": 0.17}
_SD3_PARTS = {"text_encoder": 0.25, "text_encoder_2": 1.39, "text_encoder_3": T5_XXL, "vae": 0.17}

# Widths, blocks and heads: the transformer/config.json of each; text: the pipeline's max_sequence_length, which joins
# CLIP's 77 tokens in SD3; parameters outside the blocks: counted from the class of that configuration.
PRESETS: tuple[Preset, ...] = (
    Preset(
        "flux.1-dev", "black-forest-labs/FLUX.1-dev", "FluxTransformer2DModel", _flux, 24, 512, 28,
        guided=False, guidance="calls", embedders=64_124_992, components=_FLUX_PARTS,
    ),
    Preset(
        "flux.1-schnell", "black-forest-labs/FLUX.1-schnell", "FluxTransformer2DModel", _flux, 24, 256, 4,
        guided=False, guidance="calls", embedders=53_895_232, components=_FLUX_PARTS,
    ),
    Preset(
        "sd3-medium", "stabilityai/stable-diffusion-3-medium-diffusers", "SD3Transformer2DModel",
        lambda: (dual(1536),) * 24, 24, 333, 28, embedders=76_099_648, components=_SD3_PARTS,
    ),
    Preset(
        "sd3.5-medium", "stabilityai/stable-diffusion-3.5-medium", "SD3Transformer2DModel",
        lambda: (dual(1536, attention2=True),) * 13 + (dual(1536),) * 11, 24, 333, 40,
        embedders=245_968_960, components=_SD3_PARTS,
    ),
    Preset(
        "sd3.5-large", "stabilityai/stable-diffusion-3.5-large", "SD3Transformer2DModel",
        lambda: (dual(2432),) * 38, 38, 333, 28, embedders=129_207_360, components=_SD3_PARTS,
    ),
    Preset(
        "pixart-alpha", "PixArt-alpha/PixArt-XL-2-1024-MS", "PixArtTransformer2DModel",
        lambda: (crossed(1152),) * 28, 16, 120, 20, joint=False,
        embedders=16_193_696, components={"text_encoder": T5_XXL, "vae": 0.17},
    ),
    Preset(
        "pixart-sigma", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "PixArtTransformer2DModel",
        lambda: (crossed(1152),) * 28, 16, 300, 20, joint=False,
        embedders=15_700_640, components={"text_encoder": T5_XXL, "vae": 0.17},
    ),
    Preset(
        "qwen-image", "Qwen/Qwen-Image", "QwenImageTransformer2DModel",
        lambda: (dual(3072),) * 60, 24, 128, 50, guidance="calls",
        embedders=40_523_328, components={"text_encoder": 16.58, "vae": 0.25},
    ),
    Preset(
        "hunyuandit", "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers", "HunyuanDiT2DModel",
        _hunyuan_dit, 16, 333, 50, joint=False,
        embedders=20_000_000, components={"text_encoder": 0.7, "text_encoder_2": 3.34, "vae": 0.17},
    ),
    Preset(
        "hunyuanvideo", "hunyuanvideo-community/HunyuanVideo", "HunyuanVideoTransformer3DModel",
        _hunyuan_video, 24, 256, 50, guided=False, frames=129,
        embedders=359_000_000,
        components={"text_encoder": 15.01, "text_encoder_2": 0.25, "vae": 0.49},
    ),
    Preset(
        "cogvideox-5b", "THUDM/CogVideoX-5b", "CogVideoXTransformer3DModel",
        lambda: (shared(3072),) * 42, 48, 226, 50, frames=49,
        embedders=20_000_000, components={"text_encoder": T5_XXL, "vae": 0.43},
    ),
)  # fmt: skip


def preset_named(name: str) -> Preset | None:
    """A preset by its name or hub id, in any case; ``None`` where there is none."""
    wanted = name.strip().lower()
    return next((preset for preset in PRESETS if wanted in (preset.name, preset.hub.lower())), None)
