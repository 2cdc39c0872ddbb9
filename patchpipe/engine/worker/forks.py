"""The process that workers are forked from: it loads the libraries, then does as it is told."""

from __future__ import annotations

import gc
import os
import random
import socket
import sys
import traceback
import warnings

from patchpipe.engine.processes.forkserver import PID
from patchpipe.engine.processes.fresh import command
from patchpipe.engine.worker import main as worker

LIFELINE, CHANNEL, OUTPUT = range(3)


def main() -> None:
    """Serves the parent on the other end of the socket whose number is the only argument."""
    control = socket.socket(fileno=int(sys.argv[1]))
    gc.disable()  # nothing of what is loaded goes away
    _load_libraries()
    gc.collect()
    gc.freeze()  # what the collector does not touch stays shared
    gc.enable()
    while True:
        asked, fds, _, _ = socket.recv_fds(control, 64, 3)
        if not asked:  # the parent is gone
            os._exit(0)
        if asked == b"fork":
            _fork(control, fds)
        else:
            (pid,) = PID.unpack(asked)
            control.send(PID.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))


def _load_libraries() -> None:
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork")  # threads of the algebra library, at rest
    worker.load_libraries()
    import patchpipe.pipeline.pretrained  # noqa: F401


def _fork(control: socket.socket, fds: list[int]) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            control.close()
            _become_worker(fds)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    handle = os.pidfd_open(pid)
    socket.send_fds(control, [PID.pack(pid)], [handle])
    for fd in [*fds, handle]:
        os.close(fd)


def _become_worker(fds: list[int]) -> None:
    os.setsid()
    os.dup2(fds[LIFELINE], 0)
    os.dup2(fds[OUTPUT], 1)
    os.dup2(fds[OUTPUT], 2)
    os.close(fds[LIFELINE])
    os.close(fds[OUTPUT])
    random.seed()  # as a fresh interpreter does
    if _driver_is_open():
        os.set_inheritable(fds[CHANNEL], True)
        os.execv(sys.executable, command("main", fds[CHANNEL]))
    sys.argv[1] = str(fds[CHANNEL])
    worker.main()


def _driver_is_open() -> bool:
    """Whether a library has opened the GPU's driver before the fork, after which it is of no use here."""
    import torch

    asked = getattr(torch._C, "_cuda_isInBadFork", None)
    return bool(asked is not None and asked())
