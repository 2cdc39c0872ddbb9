"""The workers' side of the engine: a process that loads its part and serves requests until its parent is gone.

The heavy libraries are imported when a worker has been told what to load.
"""
