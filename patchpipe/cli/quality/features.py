"""How far apart two pictures are to the model's own picture encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

_LEVELS = ("down_blocks", "layers")  # where encoders of diffusers' autoencoders have their blocks
_CLIP = 5  # dimensions of a weight that also spans time


class Features:
    """The encoder of a pipeline's autoencoder, as a measure of how different two pictures look.

    The distance is that of LPIPS without its learned weights (Zhang et al. 2018, equation 1): the outputs of each
    level are brought to unit length over the channels, and their squared difference is summed over the channels and
    averaged over all places and levels. 0 is the same, 4 the most there is. It needs no other model.

    Args:
        vae: The autoencoder; see ``of`` for one that may be missing.
    """

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        blocks = next((getattr(vae.encoder, name) for name in _LEVELS if hasattr(vae.encoder, name)), None)
        self._levels = [vae.encoder] if blocks is None else list(blocks)

    @classmethod
    def of(cls, pipe: Any) -> Features | None:
        """Those of a pipeline; ``None`` if it has no picture encoder."""
        vae = getattr(pipe, "vae", None)
        return cls(vae) if hasattr(vae, "encoder") and hasattr(vae, "encode") else None

    def distance(self, one: Image.Image, other: Image.Image) -> float:
        """How far apart two pictures of one size are."""
        pairs = list(zip(self._outputs(one), self._outputs(other), strict=True))
        return sum(_apart(first, second) for first, second in pairs) / len(pairs)

    def _outputs(self, picture: Image.Image) -> list[torch.Tensor]:
        """What each level makes of a picture: ``[1, channels, …]``."""
        import torch

        found: list[torch.Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            found.append(first.float())

        hooks = [level.register_forward_hook(keep) for level in self._levels]
        try:
            with torch.no_grad():
                self._vae.encode(self._input(picture))
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _input(self, picture: Image.Image) -> torch.Tensor:
        """A picture as the encoder takes it: ``[1, 3, height, width]`` from -1 to 1, or a clip of one frame."""
        import numpy as np
        import torch

        weight = next(one for one in self._vae.encoder.parameters() if one.ndim >= 4)
        pixels = torch.from_numpy(np.array(picture.convert("RGB"), np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        pixels = pixels[:, :, None] if weight.ndim == _CLIP else pixels
        return pixels.to(weight.device, weight.dtype)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    from torch.nn.functional import normalize

    difference = normalize(one, dim=1) - normalize(other, dim=1)
    return float(difference.square().sum(dim=1).mean())
