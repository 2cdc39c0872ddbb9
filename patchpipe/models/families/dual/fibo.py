"""Bria FIBO (``BriaFiboTransformer2DModel``): half the channels of the text are replaced before every block."""

from dataclasses import replace

from patchpipe.models.blocks import of
from patchpipe.models.families.dual.lists import ALL, DUAL, IDS, MERGED, PACKED
from patchpipe.models.plan import ModelPlan

MASK = "joint_attention_kwargs"  # which may hold one

BRIA_FIBO = ModelPlan(
    model="BriaFiboTransformer2DModel",
    grid=PACKED,
    blocks=tuple(
        replace(one, rows={**one.rows, MASK: of(*ALL, dim=3)}, mask=MASK, whole_between=True) for one in (DUAL, MERGED)
    ),
    inputs=("text_encoder_layers", MASK, *IDS),
    batch_dims={"text_encoder_layers": 1},
    per_request={"caption_projection.*": ("text_encoder_layers",)},
)
