"""``patchpipe check``: the command and what it shows."""
