"""What ``from_pretrained`` is asked for, read as diffusers reads it.

Options of the hub and of loading, the dtype, and quantised weights. Reading the weights themselves is the matter of
``patchpipe.loading`` and ``patchpipe.checkpoint``.
"""
