"""What follows from a layout's degrees: the place of each rank, allowed combinations, stages, patches, traffic.

Plain arithmetic, without torch. ``config`` uses it to check what a user gives.
"""
