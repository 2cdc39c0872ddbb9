"""What FLUX.1 and its relatives have in common: the latent, and both lists of blocks."""

from dataclasses import replace

from patchpipe.models.latent import Latent, sizes_by_ids
from patchpipe.models.plan import BlockList, of

PACKED = Latent("bnc", sizes=sizes_by_ids("img_ids", column=1))
WITH_REFERENCES = replace(PACKED, references=True)
STREAMS = ("encoder_hidden_states", "hidden_states")
JOINT = ("text", "image", "reference")
ROWS = {
    "encoder_hidden_states": of("text"),
    "hidden_states": of("image", "reference"),
    "image_rotary_emb": of(*JOINT, dim=0),
}

DUAL = BlockList(
    path="transformer_blocks",
    count="num_layers",
    streams=STREAMS,
    rows=ROWS,
    attention={"attn": JOINT},
    text_parameters=("context", "add_", "_added_"),
    per_call=("norm1.linear", "norm1_context.linear"),
)
SINGLE = BlockList(  # keeps the two tensors apart
    path="single_transformer_blocks",
    count="num_single_layers",
    streams=STREAMS,
    rows=ROWS,
    attention={"attn": JOINT},
    per_call=("norm.linear",),
)
MERGED = replace(  # has one of both
    SINGLE,
    streams=("hidden_states",),
    rows={"hidden_states": of(*JOINT), "image_rotary_emb": of(*JOINT, dim=0)},
)
