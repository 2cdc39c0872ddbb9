"""What all ranks agree on around a call: its arguments, the points they pass, and where they stop."""
