"""Whether a model keeps the laws of the patch pipeline: tried on a tiny random copy; and a plan proposed for a new one."""
