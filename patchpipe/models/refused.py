"""Transformer classes that are known and not carried, and why."""

REFUSED = {
    "SanaVideoTransformer3DModel": "its linear attention keeps sums instead of keys and values, and its convolutions "
    "reach over the edges of patches in space and time",
    "MotifVideoTransformer3DModel": "its blocks attend to rows of text that only the first patch has, and its last "
    "blocks begin with a state of the first ones",
    "AnyFlowFARTransformer3DModel": "it keeps keys and values of its own from chunk to chunk",
    "WanAnimate2Transformer3DModel": "it keeps keys and values of its own from chunk to chunk",
    "MiniMaxH3Transformer3DModel": "clip, sound and text are one sequence, in an order that its inputs give",
    "Cosmos3OmniTransformer": "it packs sequences of different lengths into one and masks them causally",
    "Kandinsky6Transformer3DModel": "its blocks mix clip and sound in one stream, which no plan can tell apart",
}
