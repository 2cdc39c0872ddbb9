"""Communication between ranks: how they join, process groups, channels, and the detection of failures.

Knows nothing of models, patches or pipelines: tensors go in on one rank and come out on another, in order.
"""
