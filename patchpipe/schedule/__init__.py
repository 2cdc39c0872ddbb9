"""The patch pipeline at work: a request's calls through the stages, and requests in flight together.

What a stage computes is ``stage``'s and ``parallel``'s; when, and what goes from one to the next, is decided here.
"""
