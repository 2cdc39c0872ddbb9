"""Ranks that talk to one another: how they meet, the groups and wires between them, and who notices trouble.

Knows nothing of models, patches or pipelines: tensors go in on one rank and come out on another, in order.
"""
