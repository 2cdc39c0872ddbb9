"""What follows from a layout's degrees alone: axes and lines of ranks, and which methods go together."""
