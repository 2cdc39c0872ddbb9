"""One copy of offloaded weights for all ranks of a host that hold the same.

``file`` is memory that several processes map; ``peers`` is how ranks tell each other of it; ``home`` is a block's
weights in such memory; ``sharing`` says which ranks share, and who packs.
"""
