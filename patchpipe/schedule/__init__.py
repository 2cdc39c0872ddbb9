"""The patch pipeline at work: a request's calls through the stages, and requests in flight together."""
