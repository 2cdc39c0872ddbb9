"""What follows from a layout's degrees alone: who is where, which methods go together, stages, patches, traffic.

Plain arithmetic, without torch: ``config`` is checked by it.
"""
