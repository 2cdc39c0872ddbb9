"""One module for each command: its options, its help, and what it does with what the rest of ``cli`` offers.

None imports torch before its options are read, so that ``--help`` and bad input answer at once.
"""
