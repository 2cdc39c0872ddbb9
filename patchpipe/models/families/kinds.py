"""Kinds of latents and of blocks that several classes have, each named once."""

from dataclasses import replace

from patchpipe.models.blocks import CROSS, BlockList, of
from patchpipe.models.latent import Latent, sizes_by_numbers

CLIP = Latent("bcfhw", cut="f")
FRAMES_FIRST = Latent("bfchw", cut="f")
PACKED_CLIP = Latent("bnc", cut="f", sizes=sizes_by_numbers)

MASKED_TEXT = ("encoder_hidden_states", "encoder_attention_mask")
CONDITIONS = ("encoder_hidden_states", "encoder_hidden_states_image")  # a class may lack the second
SIZES = ("original_size", "target_size", "crop_coords")
NUMBERS = ("num_frames", "height", "width")

SELF_AND_CROSS = BlockList(
    attention={"attn1": ("image",), "attn2": CROSS},
    per_request=dict.fromkeys((f"attn2.{name}" for name in ("to_k", "to_v", "add_k_proj", "add_v_proj")), CONDITIONS),
)
ROTARY = {"image_rotary_emb": of("image", dim=0)}  # of the picture alone

JOINT = BlockList(streams=("hidden_states", "encoder_hidden_states"), attention={"attn1": ("text", "image")})
JOINT_WITH_ROTARY = replace(JOINT, rows=ROTARY)
MERGED = BlockList(  # one stream has both
    path="single_transformer_blocks", rows={"hidden_states": of("text", "image")}, attention={"attn": ("text", "image")}
)


def variants(of_family: str, *kinds: str) -> tuple[str, ...]:
    """Pipelines of one family, such as ``FluxPipeline`` and ``FluxFillPipeline``: ``variants("Flux", "", "Fill")``."""
    return tuple(f"{of_family}{kind}Pipeline" for kind in kinds)
