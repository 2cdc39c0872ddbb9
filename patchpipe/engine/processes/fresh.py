"""A Python of its own for what the engine starts: its environment, and what it runs first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from patchpipe.engine.devices import loopback_interface

_PACKAGE = Path(__file__).resolve().parents[2]
# ``python -m`` and ``python -c`` look for modules in the current folder first, and ``-P`` came with Python 3.11. The
# package is loaded by its place, so that a folder it shares with others does not go before the standard library.
_BOOTSTRAP = """
import sys
sys.path[:] = [place for place in sys.path if place]
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("patchpipe", sys.argv[2])
package = sys.modules["patchpipe"] = module_from_spec(spec)
spec.loader.exec_module(package)
from patchpipe.engine.worker.{module} import main
main()
"""


def command(module: str, fd: int) -> list[str]:
    """The command line of a Python that runs ``main`` of one of the worker's modules.

    Args:
        module: ``"main"`` or ``"forks"``.
        fd: The socket it is to talk over.
    """
    return [sys.executable, "-c", _BOOTSTRAP.format(module=module), str(fd), str(_PACKAGE / "__init__.py")]


def start(
    module: str, fd: int, env: Mapping[str, str], output: int | IO[bytes], stdin: int = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    """Starts it.

    Args:
        module: See ``command``.
        fd: Likewise.
        env: Its environment.
        output: Where it prints to.
        stdin: What it reads; unless told otherwise, a pipe that is its lifeline.
    """
    return subprocess.Popen(
        command(module, fd),
        stdin=stdin,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=(fd,),
        env=dict(env),
        start_new_session=True,  # a Ctrl-C in the terminal is the parent's to handle
    )


def environment(threads: int, offline: bool) -> dict[str, str]:
    """The environment of workers.

    Args:
        threads: CPU threads of each.
        offline: Keep them from asking the hub, which cannot be reached.
    """
    env = dict(os.environ)
    env.update(
        PYTHONPATH=_python_path(os.environ.get("PYTHONPATH", "")),
        PYTHONUNBUFFERED="1",
        PYTHONUTF8="1",  # whatever the locale, folders have their names
        PYTHONFAULTHANDLER="1",
        OMP_NUM_THREADS=str(threads),
        MKL_NUM_THREADS=str(threads),
        TOKENIZERS_PARALLELISM="false",
    )
    # Every communicator has a stream; two that share a hardware queue wait for each other, in a circle if need be.
    env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    # Asking whether there is a GPU must not open the driver: a process that has done so cannot be forked.
    env.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    if offline:
        env["HF_HUB_OFFLINE"] = "1"
    interface = loopback_interface()
    if interface is not None:
        env.setdefault("GLOO_SOCKET_IFNAME", interface)
    return env


def _python_path(paths: str) -> str:
    """``PYTHONPATH`` for the workers: relative places made absolute, less those that mean the current folder."""
    given = [path for path in paths.split(os.pathsep) if os.path.normpath(path or ".") != "."]
    return os.pathsep.join(dict.fromkeys(map(os.path.abspath, given)))
