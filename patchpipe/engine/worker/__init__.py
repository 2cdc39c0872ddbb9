"""The workers' side of the engine: a process that loads its part and serves requests."""
