"""torch's attention kernels: which one runs for a call, why no faster one does, and attention with its log-sum-exp.

Also what replaces calls in an attention processor's code, and the kernels of the forecast.
"""
