"""What FLUX.1 and its relatives have in common: the latent, and both lists of blocks."""

from dataclasses import replace

from patchpipe.models.blocks import BlockList, of
from patchpipe.models.latent import Latent, sizes_by_ids

PACKED = Latent("bnc", sizes=sizes_by_ids("img_ids", column=1))
WITH_REFERENCES = replace(PACKED, references=True)
IDS = ("img_ids", "txt_ids")
ALL = ("text", "image", "reference")
ADAPTERS: dict[str, tuple[str, ...]] = {"FluxIPAdapterAttnProcessor": ()}

DUAL = BlockList(
    streams=("encoder_hidden_states", "hidden_states"),
    rows={"hidden_states": of("image", "reference"), "image_rotary_emb": of(*ALL, dim=0)},
    attention={"attn": ALL},
)
SINGLE = replace(DUAL, path="single_transformer_blocks", count="num_single_layers")  # keeps the two tensors apart
MERGED = replace(  # has one of both
    SINGLE, streams=("hidden_states",), rows={"hidden_states": of(*ALL), "image_rotary_emb": of(*ALL, dim=0)}
)
