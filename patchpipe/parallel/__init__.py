"""One way of sharing a stage each: by heads, rows, matrices, parts of the latent or entries of a batch.

Every method is a file; what several of them refuse is told in the same words.
"""
