"""Proposes a plan for a class that has none, from a few runs of a tiny copy."""
