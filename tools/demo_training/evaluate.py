"""``evaluate``: the flow loss of a pipeline folder, and sheets of what it paints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

from .captions import Caption
from .console import CONSOLE
from .dataset import Pictures
from .latents import encode, normalise
from .model import painter_of
from .text import Tokens
from .transformer import flow_loss

LEVELS = (0.1, 0.5, 0.9, 1.0)
SHEET = (
    "red apple, 3d style", "cat face, noto style", "rainbow, flat style", "frog, noto style",
    "cherry blossom, flat style", "red heart, 3d style", "sunflower, twemoji style", "octopus, 3d style",
    "wolf, 3d style", "cow, flat style", "umbrella, twemoji style", "turtle, noto style",
    "doughnut, twemoji style", "penguin, 3d style", "tiger face, flat style", "fish, noto style",
    "pizza, twemoji style", "violin, flat style", "balloon, 3d style", "teddy bear, flat style",
    "cat face, twemoji style", "bread, twemoji style", "lollipop, noto style", "sun, noto style",
)  # fmt: skip


@torch.no_grad()
def losses(
    pipe: FluxPipeline,
    pictures: Pictures,
    levels: Sequence[float] = LEVELS,
    draws: int = 4,
    text_length: int = 16,
    captions: Sequence[str] | None = None,
) -> list[float]:
    """Mean flow loss of some pictures at each noise level, with fixed noise.

    Args:
        pipe: The pipeline.
        pictures: The pictures, with their captions.
        levels: Noise levels, 1 being pure noise.
        draws: Noises per picture.
        text_length: T5 length in tokens.
        captions: Captions to use instead of the pictures' own.
    """
    painter = painter_of(pipe).eval()
    device = pipe.transformer.device
    texts = [str(caption) for caption in pictures.captions] if captions is None else list(captions)
    clip_ids, t5_ids = Tokens(pipe.tokenizer, pipe.tokenizer_2, device)(texts, text_length)
    latents = normalise(pipe.vae, encode(pipe.vae, pictures.pixels))
    result = []
    for level in levels:
        total = 0.0
        for seed in range(draws):
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(device)
            s = torch.full((len(latents),), level, device=device)
            parts = zip(*(x.split(64) for x in (latents, s, noise, clip_ids, t5_ids)), strict=True)
            total += sum(float(flow_loss(painter, *part).sum()) for part in parts) / len(latents)
        result.append(total / draws)
    return result


def paint(
    pipe: FluxPipeline, captions: Sequence[str], size: int = 128, steps: int = 20, guidance: float = 3.0
) -> list[Image.Image]:
    """Paint one picture per caption, seeds 0, 1, 2 …, with plain diffusers."""
    images = []
    for seed, caption in track(list(enumerate(captions)), "painting", console=CONSOLE, transient=True):
        images += pipe(
            caption,
            negative_prompt="",
            true_cfg_scale=guidance,
            height=size,
            width=size,
            num_inference_steps=steps,
            max_sequence_length=32,
            generator=torch.Generator().manual_seed(seed),
        ).images
    return images


def sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 6) -> Image.Image:
    """Lay pictures out in a grid, the caption below each."""
    side, label, gap = images[0].width, 16, 4
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + label + gap) + gap), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=10)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + label + gap)
        page.paste(image, (x, y))
        pen.text((x + side / 2, y + side + label / 2), caption, fill="black", font=font, anchor="mm")
    return page


def mark_held_out(captions: Sequence[str], held_out: Sequence[Caption]) -> list[str]:
    """Put a star after the captions that training never saw."""
    unseen = {str(caption) for caption in held_out}
    return [caption + (" *" if caption in unseen else "") for caption in captions]
