"""Requests that come and go while others run: held after a step, let go, carried elsewhere, withdrawn.

Rank 0 decides, and tells the others at a point of the program that all ranks pass; so all do the same at the same step.
"""
