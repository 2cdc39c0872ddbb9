"""The patch pipeline at work: a request's calls through the stages, and requests in flight together.

Decides when stages compute and what goes from one to the next. What they compute is in ``stage`` and ``parallel``.
"""
