"""Offload: a rank's blocks in host memory or on disk, copied in chunks while other blocks compute.

``choice`` picks what stays on the device and how far ahead chunks are copied, by the ``model`` of the transfers;
``weights`` takes parameters apart and puts them together; ``ring`` says where they lie in the ring buffer; ``mover``
copies, in a thread of its own; ``shared`` lets ranks of a host share one copy; ``offload`` puts all of this on a rank's
blocks.
"""
