"""What is known of a model before it is loaded (source, options, dtype), and reading a part of its weights.

Knows nothing of ranks: the caller says which part it wants.
"""
