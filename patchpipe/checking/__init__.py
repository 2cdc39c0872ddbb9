"""Whether a model keeps the laws of the patch pipeline: tried on a tiny copy; and a plan for a new one."""
