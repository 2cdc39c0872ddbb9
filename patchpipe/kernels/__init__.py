"""torch's attention kernels: which one takes a call, why not a faster one, and attention with its log-sum-exp."""
