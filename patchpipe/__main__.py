"""``python -m patchpipe``: the command line."""

from __future__ import annotations

import sys

from patchpipe.cli import app

if __name__ == "__main__":
    sys.exit(app())
