"""The methods by which ranks share a stage: by heads, rows, matrices, parts of the latent or entries of a batch.

Each method has its file. ``refusals`` has the errors that several of them share.
"""
