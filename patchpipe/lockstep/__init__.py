"""What all ranks agree on around a call: its arguments, the points they pass, and where they stop.

Every rank runs the same program. If that is not so, ranks find out here, before one waits for another.
"""
