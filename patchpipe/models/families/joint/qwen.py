"""Qwen-Image (``QwenImageTransformer2DModel``): dual-stream blocks, padded text under a mask."""

from patchpipe.models.blocks import BlockList, of
from patchpipe.models.families.kinds import variants
from patchpipe.models.latent import Latent, sizes_by_shapes
from patchpipe.models.plan import ModelPlan

PICTURES = ("image", "reference")
PAINTING = ("", "Img2Img", "Inpaint", "Layered")
GIVEN_PICTURES = ("Edit", "EditInpaint", "EditPlus", "ControlNet", "ControlNetInpaint")
BLOCKS = BlockList(
    streams=("encoder_hidden_states", "hidden_states"),
    rows={
        **dict.fromkeys(("hidden_states", "modulate_index"), of(*PICTURES)),
        "encoder_hidden_states_mask": of("text"),
        "image_rotary_emb": (of(*PICTURES, dim=0), of("text", dim=0)),
    },
    attention={"attn": ("text", *PICTURES)},
    mask="encoder_hidden_states_mask",
)

QWEN_IMAGE = ModelPlan(
    model="QwenImageTransformer2DModel",
    pipelines=variants("QwenImage", *PAINTING, *GIVEN_PICTURES),
    grid=Latent("bnc", sizes=sizes_by_shapes("img_shapes"), references=True),
    blocks=(BLOCKS,),
    inputs=("encoder_hidden_states_mask", "img_shapes", "additional_t_cond"),
    residuals={"controlnet_block_samples": of(*PICTURES)},
    guidance="calls",
    tensor="class",
    per_request={"pos_embed": ("img_shapes", "encoder_hidden_states")},
    refused_settings=("guidance_embeds",),
)
