"""Requests that join, pause, resume, move to other ranks or are withdrawn while others run.

Rank 0 decides, and tells the others at a point of the program that all ranks pass. So all do the same at the same step.
"""
