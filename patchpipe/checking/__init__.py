"""Tries the laws of the patch pipeline on a tiny copy of a model, and proposes a plan for a class without one."""
