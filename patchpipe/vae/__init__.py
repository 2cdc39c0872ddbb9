"""Patch-parallel VAE: every rank decodes or encodes a strip of rows, and the whole is exact, not blended.

The picture is cut into strips of rows, one per rank. A layer that looks at one position at a time runs on
the strip as it is. The few that mix rows talk: a convolution fetches the neighbours' border rows, a group
norm merges the ranks' statistics, an attention gathers keys and values. Activation memory per rank is
about one N-th of the whole decode's.
"""

from patchpipe.distributed.rows import Halo, RowGroup, WireRows, join_rows
from patchpipe.vae.apply import spread_vae

__all__ = ["Halo", "RowGroup", "WireRows", "join_rows", "spread_vae"]
