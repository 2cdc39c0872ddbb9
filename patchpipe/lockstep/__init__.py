"""What all ranks agree on around a call: its arguments, the points they pass, and where they stop.

Every rank runs the same program. Here they find out, before any of them waits for another, where that is not so.
"""
