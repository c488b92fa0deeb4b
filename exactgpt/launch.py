"""How this process was started, and the streams and signals that it was given. Standard library only.

Each script imports this file first: torch's import takes seconds, and meanwhile a launcher may be killed or Ctrl-C be
pressed.
"""
import codecs
import contextlib
import ctypes
import os
import shlex
import signal
import sys
from pathlib import Path


def by_torchrun():
    """Return True if torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "WORLD_SIZE" in os.environ


def die_with_launcher():
    """Under torchrun on Linux, ask the kernel to kill this process when torchrun dies, even by kill -9."""
    # Otherwise the workers of a killed launcher train on unnoticed. A plain `nohup python train.py &` keeps running.
    if not by_torchrun() or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # 1 = PR_SET_PDEATHSIG
    # If torchrun died before prctl took effect, init (or systemd --user) has adopted this process. In a container
    # torchrun itself may be process 1, but then that is a Python process. Other foster parents are not recognized here;
    # on one machine torchrun's store has died with it, and wait_for_peers gives up.
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
        if (os.getppid() == 1 or b"systemd" in command) and b"python" not in command:
            os._exit(1)


def end_quietly_on_ctrl_c():
    """Let Ctrl-C end this process without a traceback while it imports; run_script takes over."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    ours = main and Path(main).resolve().parent == Path(__file__).resolve().parents[1]      # not pytest, for instance
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):      # streamlit runs app.py in a thread
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def fill_closed_streams():
    """Open /dev/null for each standard stream that is closed (`2>&-`)."""
    # Otherwise the next file that is opened, a checkpoint say, gets number 2, and what C code prints goes into it.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)      # it gets the lowest free number: this one


def escape(error):
    """Encode what an encoding lacks: a file name's undecodable bytes as they are, characters as \\xfc or \\u2019."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def printable(text):
    """Return a text without undecoded bytes, which Python makes of a command line in a locale like LC_ALL=C."""
    return text.encode("utf-8", "escape").decode("utf-8", "replace")


class Output:
    """Standard output or error whose writes do not fail: a run must outlive its terminal and a full disk under its log.

    What cannot be written is dropped; `lost` is the last error. With `required` it is raised.
    """

    def __init__(self, stream):
        self._stream, self.lost, self.required = stream, None, False

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def _attempt(self, action, *arguments):
        try:
            return action(*arguments)
        except (OSError, ValueError) as error:      # a full disk, a pipe without a reader, a closed file
            self.lost = error
            if self.required:
                raise

    def write(self, text):
        """Write a text, or drop it."""
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self):
        """Write what is buffered, or keep it for the next attempt."""
        self._attempt(self._stream.flush)


def guard_streams():
    """Make standard output and error drop what they cannot write, and escape characters that their encoding lacks."""
    with contextlib.suppress(AttributeError):      # closed, or a stream of a test or a notebook
        sys.stdin.reconfigure(errors="surrogateescape")      # for printable()
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name) or open(number, "w", closefd=False)      # None: it was closed at the start
        if not isinstance(stream, Output):
            with contextlib.suppress(AttributeError):
                stream.reconfigure(errors="escape")
            setattr(sys, name, Output(stream))


def is_lost_output(error):
    """Return True if the error is that of writing required output."""
    return error is getattr(sys.stdout, "lost", None)


def require_output(required=True):
    """Let the script end with an error if standard output is lost, because what it prints is its result."""
    if isinstance(sys.stdout, Output):
        sys.stdout.required = required


def command_line():
    """Return the command that started this process, or torchrun, as it can be pasted into a shell."""
    words = ["python", *sys.argv]
    if by_torchrun():
        words = ["torchrun", "...", *sys.argv]
        with contextlib.suppress(OSError):      # Linux knows what the parent's own command is
            words = os.fsdecode(Path(f"/proc/{os.getppid()}/cmdline").read_bytes()).split("\0")[:-1]
    return shlex.join(words)


def begin():
    """Do what cannot wait until the other imports are done."""
    die_with_launcher()
    end_quietly_on_ctrl_c()
    fill_closed_streams()
    codecs.register_error("escape", escape)


begin()
