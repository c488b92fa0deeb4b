"""How this process was started, typed or by torchrun, and what follows from it. Standard library only."""
import ctypes
import os
import shlex
import signal
import sys


def die_with_launcher():
    """Under torchrun on Linux, ask the kernel to kill this process when torchrun dies, even by kill -9.

    Otherwise the workers of a killed launcher train on, unseen. A plain `nohup python train.py &` is left alone.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before the kernel knew of our wish
        os._exit(1)


def command_line():
    """The command that started this process, as typed; under torchrun the part that torchrun ran."""
    return " ".join(["torchrun ..." if "TORCHELASTIC_RUN_ID" in os.environ else "python", *map(shlex.quote, sys.argv)])
