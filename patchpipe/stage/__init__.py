"""One rank's blocks of the model at work: which they are, the patches they see, and stale keys and values.

Runs the model's own ``forward`` on one patch. Communication between ranks that share a patch is in ``parallel``.
"""
