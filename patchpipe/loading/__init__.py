"""What is known of a model before it is loaded, and reading a part of it: source, options, dtype, weights.

No ranks here: which part is wanted is told by the caller.
"""
