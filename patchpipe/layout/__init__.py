"""What follows from a layout's degrees alone: axes, lines of ranks, communicators, and which methods go together.

Plain arithmetic, without torch: ``config`` is checked by it.
"""
