"""How this process was started: by hand or by torchrun. Standard library only.

Each script imports this file before torch, whose import takes seconds: a launcher may be killed meanwhile.
"""
import contextlib
import ctypes
import os
import shlex
import signal
import sys
from pathlib import Path


def die_with_launcher():
    """Under torchrun on Linux, ask the kernel to kill this process when torchrun dies, even by kill -9."""
    # Otherwise the workers of a killed launcher train on unnoticed. A plain `nohup python train.py &` keeps running.
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # 1 = PR_SET_PDEATHSIG
    # If torchrun died before prctl took effect, init (or systemd --user) has adopted this process. In a container
    # torchrun itself may be process 1, but then that is a Python process.
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
        if (os.getppid() == 1 or b"systemd" in command) and b"python" not in command:
            os._exit(1)


def command_line():
    """Return the command that started this process, as typed; under torchrun only the part that torchrun ran."""
    return " ".join(["torchrun ..." if "TORCHELASTIC_RUN_ID" in os.environ else "python", *map(shlex.quote, sys.argv)])


die_with_launcher()
