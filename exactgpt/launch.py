"""Helpers that depend on how this process was started: by hand or by torchrun. Standard library only."""
import ctypes
import os
import shlex
import signal
import sys


def die_with_launcher():
    """Under torchrun on Linux, ask the kernel to kill this process when torchrun dies, even by kill -9.

    Otherwise the workers of a killed launcher keep training unnoticed. A plain `nohup python train.py &` keeps running.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before prctl took effect
        os._exit(1)


def command_line():
    """Return the command that started this process, as typed; under torchrun only the part that torchrun ran."""
    return " ".join(["torchrun ..." if "TORCHELASTIC_RUN_ID" in os.environ else "python", *map(shlex.quote, sys.argv)])
