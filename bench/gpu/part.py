"""Runs one part in this process.

python -m bench.gpu.part MODULE SETTING FILE
"""

from __future__ import annotations

import ctypes
import importlib
import json
import signal
import sys
import traceback
from pathlib import Path

from bench.gpu.setting import Rows, Setting, Skip

PR_SET_PDEATHSIG = 1
SKIPPED = 77  # exit status; the reason is the last line of what is printed


def main(module: str, setting: str, file: str) -> int:
    """The exit status."""
    if sys.platform == "linux":  # a command that is killed leaves no part, and a part no ranks
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    rows = Rows(Path(file))
    try:
        part = importlib.import_module(module)
        if "tests.support.ranks" in sys.modules:
            sys.modules["tests.support.ranks"].quieten()
        part.run(Setting(**json.loads(setting)), rows.note)
    except Skip as why:
        print(why, flush=True)
        return SKIPPED
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
